"""Every option of a config, once: default, type, range, documentation, resume policy, and who reads it."""

from vit_jax.config.option import MAX_SEED, NAMES, SEEDS, STEPS, WEIGHTS, Option, When, changeable, free
from vit_jax.config.schema_data import AUGMENT, CLASSIFY, DATA, MAX_SIDE

MAX_DEPTH, MAX_WIDTH = 1000, 2**20
INIT_FROM = "init_from"  # value of options that are taken from the parameters of checkpoint.init_from

MASKED = When("train.objective", "masked_patches", "masked_autoencoder")
MASKED_AUTOENCODER = When("train.objective", "masked_autoencoder")
ADAM = When("optimizer.name", "adamw", "adam")

MODEL = {
    "variant": Option(
        "Ti/4",
        str,
        "Model size (Ti, S, B, L, H), slash, patch size in pixels; a hybrid such as R50+B/16; or init_from: that of "
        "checkpoint.init_from.",
    ),
    "width": Option(None, int, "Token width. None: from the variant.", min=1, max=MAX_WIDTH),
    "depth": Option(None, int, "Number of encoder blocks. None: from the variant.", min=1, max=MAX_DEPTH),
    "heads": Option(None, int, "Number of attention heads per block. None: from the variant.", min=1),
    "mlp_width": Option(None, int, "Hidden width of the MLPs. None: from the variant.", min=1, max=MAX_WIDTH),
    "class_token": Option(None, bool, "Prepend a learned class token. None: only if pooling needs one."),
    "registers": Option(0, int, "Number of register tokens, which no head reads.", min=0, max=MAX_SIDE),
    "pooling": Option(
        "token",
        str,
        "Input of the head: class token, mean of the patches, both (token_mean), class token and first register "
        "(token_register), or attention pooling (map).",
        choices=("token", "mean", "token_mean", "token_register", "map"),
    ),
    "position": Option(
        "learned",
        str,
        "Position embedding; see docs/models.md.",
        choices=(
            *("learned", "learned_2d", "sincos_2d", "sinusoidal", "none", "relative", "relative_class", "rotary"),
            *("dinov3", "eva02", "pe", "learned_rotary", "learned_eva02", "learned_pe"),
        ),
    ),
    "position_at": Option(
        None,
        str,
        "Where positions act: the input, all layers, or all layers with shared parameters. None: depends on position.",
        choices=("input", "layers", "shared"),
    ),
    "position_width": Option(
        0, int, "Channels of a fixed position embedding that is concatenated to the tokens. 0: added instead.", min=0
    ),
    "position_grid": Option(
        None,
        int,
        "Patches per side of the coordinate grid. None: as in the images.",
        min=1,
        read_by=When("model.position", "sincos_2d", "eva02", "pe", "learned_eva02", "learned_pe"),
    ),
    "mlp": Option("gelu", str, "MLP type.", choices=("gelu", "swiglu")),
    "gelu": Option(
        "tanh",
        str,
        "GELU: exact, approximate (tanh), or x sigmoid(1.702 x) (quick).",
        choices=("tanh", "exact", "quick"),
        read_by=When("model.mlp", "gelu"),
    ),
    "qkv_bias": Option(True, bool, "Use biases in the query, key and value projections."),
    "qk_norm": Option(False, bool, "Normalize queries and keys per head."),
    "layer_scale": Option(
        None, float, "Initial value of LayerScale on the residual branches. None: no LayerScale.", above=0
    ),
    "parallel": Option(False, bool, "Compute attention and MLP in parallel instead of one after the other."),
    "norm": Option("layer", str, "All norms: LayerNorm or RMSNorm.", choices=("layer", "rms")),
    "layer_norm_epsilon": Option(1e-6, float, "Epsilon added to the variance in all norms.", above=0),
    "input_norm": Option(
        None,
        str,
        "Norm before the blocks: of the patch embeddings, or of all tokens with positions, as in CLIP.",
        choices=("patches", "tokens"),
    ),
    "attention_norm": Option(False, bool, "Normalize the output of attention before its projection."),
    "mlp_norm": Option(False, bool, "Normalize the hidden units of the MLPs."),
    "final_norm": Option(True, bool, "Normalize after the last block."),
    "pool_heads": Option(
        None,
        int,
        "Number of heads of attention pooling. None: as in the blocks.",
        min=1,
        read_by=When("model.pooling", "map"),
    ),
    "pre_logits": Option(
        None,
        int,
        "Width of a Dense + tanh layer before the logits; width: that of the tokens. None: none.",
        min=1,
        max=MAX_WIDTH,
        words=("width",),
        read_by=CLASSIFY,
    ),
    "head_bias": Option(
        0.0, float, "Initial bias of the logits. -10 is usual with the sigmoid loss.", read_by=CLASSIFY
    ),
    "norm_after_pooling": Option(
        False,
        bool,
        "Apply the final LayerNorm after mean pooling instead of before it.",
        read_by=(CLASSIFY, When("model.pooling", "mean")),
    ),
    "dropout": changeable(
        0.0, float, "Dropout rate after the position embedding and after dense layers.", min=0, below=1
    ),
    "attention_dropout": changeable(0.0, float, "Dropout rate on the attention weights.", min=0, below=1),
    "stochastic_depth": changeable(
        0.0, float, "Stochastic depth: drop rate of the last block's branches.", min=0, below=1
    ),
    "stochastic_depth_schedule": changeable(
        "linear",
        str,
        "Stochastic depth rate over the blocks: linear from 0, or constant.",
        choices=("linear", "constant"),
        read_by=When("model.stochastic_depth", above=0),
    ),
    "remat": changeable(
        False,
        bool,
        "Recompute block activations in the backward pass. True, full: all of them; dots: all but matmul outputs; "
        "dots_no_batch: all but outputs of matmuls with parameters.",
        words=("none", "full", "dots", "dots_no_batch"),
    ),
    "scan": Option(False, bool, "Compile one block and scan over depth. Compiles faster."),
    "attention_kernel": changeable(
        "auto",
        str,
        "Attention implementation. auto: the fastest for the device and shapes; on a GPU it is timed at startup.",
        choices=("auto", "plain", "heads_first", "cudnn", "pallas", "pallas_two_pass_64", "pallas_two_pass_32"),
    ),
    "dtype": changeable(
        "auto",
        str,
        "Compute dtype. auto: float32 on CPU, bfloat16 on accelerators. On CPU, bfloat16 applies to matmuls only.",
        choices=("auto", "float32", "bfloat16"),
    ),
}

OPTIMIZER = {
    "name": Option("adamw", str, "Optimizer.", choices=("adamw", "adam", "sgd")),
    "learning_rate": changeable(1e-3, float, "Peak learning rate.", min=0),
    "schedule": changeable(
        "cosine", str, "Learning-rate schedule after warmup.", choices=("cosine", "linear", "constant")
    ),
    "warmup_steps": changeable(0, int, "Steps of linear learning-rate warmup. Shorter runs: a tenth of them.", min=0),
    "final_learning_rate": changeable(
        0.0, float, "Learning rate at the last step.", min=0, read_by=When("optimizer.schedule", "cosine", "linear")
    ),
    "weight_decay": changeable(
        0.0, float, "Weight decay, on kernels only. adamw: decoupled; adam and sgd: added to the gradient.", min=0
    ),
    "beta1": changeable(0.9, float, "Adam: decay rate of the first moment.", min=0, below=1, read_by=ADAM),
    "beta2": changeable(0.999, float, "Adam: decay rate of the second moment.", min=0, below=1, read_by=ADAM),
    "epsilon": changeable(1e-8, float, "Adam: epsilon in the denominator.", min=0, read_by=ADAM),
    "momentum": changeable(0.9, float, "SGD: momentum.", min=0, below=1, read_by=When("optimizer.name", "sgd")),
    "layer_decay": changeable(
        1.0, float, "Layer-wise learning-rate decay: factor per block, from the last block down. 1: off.", min=0, max=1
    ),
    "gradient_clip": changeable(None, float, "Maximum global gradient norm. None: no clipping.", min=0),
    "trained": Option(None, NAMES, "Name patterns of the parameters to train, for example 'head/*'. None: all."),
    "frozen": Option(
        None, NAMES, "Name patterns of the parameters to freeze, for example 'embedding/*,positions/*'. None: none."
    ),
    "average_decay": Option(
        0.0,
        float,
        "Decay of the exponential moving average of the parameters, which is then evaluated. 0: off.",
        min=0,
        below=1,
    ),
}

TRAIN = {
    "seed": Option(0, int, "Random seed of initialization, data order, augmentation and dropout.", min=0, max=MAX_SEED),
    "seeds": Option(
        None,
        SEEDS,
        "Train several seeds and report mean and std: their number, from train.seed (5), or a list (0,3,7). None: one.",
    ),
    "batch_size": Option(
        128,
        int,
        "Examples per step, over all devices and microbatches. auto: the largest that fits in accelerator memory.",
        min=1,
        words=("auto",),
    ),
    "steps": changeable(None, int, "Number of training steps. None: set by epochs.", min=1),
    "epochs": changeable(None, float, "Number of passes over the training split. None: set by steps.", min=0),
    "accumulation": changeable(1, int, "Gradient accumulation: number of microbatches per step.", min=1),
    "loss_weights": changeable(
        None,
        WEIGHTS,
        "Weights of the losses of several heads, for example 'label=1,coarse_label=0.5'. None: 1 each.",
        read_by=CLASSIFY,
    ),
    "class_weights": changeable(
        "none",
        str,
        "Weights of the classes in the training loss. balanced: inversely proportional to their numbers of examples.",
        choices=("none", "balanced"),
        read_by=CLASSIFY,
    ),
    "objective": Option(
        "classify",
        str,
        "Training objective: classification, or masked-image pre-training; see docs/pretraining.md.",
        choices=("classify", "masked_patches", "masked_autoencoder"),
    ),
    "loss": Option(
        "softmax",
        str,
        "Classification loss: softmax cross-entropy, or sigmoid cross-entropy summed over classes.",
        choices=("softmax", "sigmoid"),
        read_by=CLASSIFY,
    ),
    "masked_share": Option(
        None,
        float,
        "Fraction of patches that are masked. None: 0.5 for masked_patches, 0.75 for masked_autoencoder.",
        min=0.001,
        below=1,
        read_by=MASKED,
    ),
    "label_smoothing": changeable(
        0.0, float, "Label smoothing: target mass spread over all classes.", min=0, below=1, read_by=CLASSIFY
    ),
    "evaluate_every": changeable(0, int, "Steps between evaluations. 0: evaluate only at the end.", min=0),
    "evaluation_batch_size": free(None, int, "Examples per evaluation step. None: train.batch_size.", min=1),
    "steps_per_dispatch": free(50, int, "Maximum number of training steps per jitted call.", min=1),
    "max_minutes": free(None, float, "Save and stop after this many minutes; rerun to resume. None: no limit.", min=0),
}

DECODER = {
    "width": Option(128, int, "Token width of the decoder.", min=4, max=MAX_WIDTH, read_by=MASKED_AUTOENCODER),
    "depth": Option(2, int, "Number of decoder blocks.", min=1, max=MAX_DEPTH, read_by=MASKED_AUTOENCODER),
    "heads": Option(4, int, "Number of attention heads per decoder block.", min=1, read_by=MASKED_AUTOENCODER),
    "mlp_width": Option(512, int, "Hidden width of its MLPs.", min=1, max=MAX_WIDTH, read_by=MASKED_AUTOENCODER),
    "normalize_patches": Option(
        True, bool, "Reconstruct normalized patches instead of raw pixels.", read_by=MASKED_AUTOENCODER
    ),
}

CHECKPOINT = {
    "every": free(0, int, "Steps between checkpoints. 0: only at the end and at each new best validation.", min=0),
    "init_from": Option(
        None,
        str,
        "Initial parameters: a run directory or any file that docs/weights.md lists. None: random initialization.",
    ),
    "init_head": Option(
        "keep",
        str,
        "Head of init_from: keep it if its classes match, or start with a new head of zeros.",
        choices=("keep", "new"),
    ),
    "keep": free(2, int, "Number of newest checkpoints to keep.", min=1),
    "keep_best": free(
        1,
        int,
        "Number of best checkpoints to keep in addition, by validation accuracy (or loss if there is none).",
        min=0,
    ),
}

MESH = {
    "devices": free(None, int, "Number of devices to use. None: all.", min=1),
    "distributed": free(False, bool, "Join a multi-process cluster (jax.distributed.initialize)."),
}

LOG = {
    "every": free(50, int, "Steps between log records; train/... metrics are averaged over them.", min=1),
    "report": free(
        True, bool, "Write report.html at the end of the run: curves, evaluation, images; see docs/report.md."
    ),
    "tensorboard": free(True, bool, "Write TensorBoard events in addition to metrics.jsonl."),
    "tracker": free(
        None,
        str,
        "Log the metrics to a tracker too, if its package is installed. None: to none.",
        choices=("wandb", "mlflow", "trackio"),
    ),
    "profile": free(
        None, STEPS, "Steps START:STOP to profile; the trace is written to WORKDIR/profile. None: no profile."
    ),
}

OPTIONS: dict[str, dict[str, Option]] = {
    "model": MODEL,
    "data": DATA,
    "augment": AUGMENT,
    "optimizer": OPTIMIZER,
    "train": TRAIN,
    "decoder": DECODER,
    "checkpoint": CHECKPOINT,
    "mesh": MESH,
    "log": LOG,
}
# Options that no longer exist, and what to do instead. Old config.json files may have them.
REMOVED = {"train.seeds_at_once": "seeds are trained one after another"}
