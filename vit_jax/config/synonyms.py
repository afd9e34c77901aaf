"""What an unknown option may mean: misspelled, in another section, or named as in other libraries."""

from vit_jax.config.schema import OPTIONS
from vit_jax.errors import nearest

# Options by the names that timm, Hugging Face's Trainer, Lightning, big_vision and others give them.
SYNONYMS = {
    "model.variant": "arch architecture model model_name model_type model.name model.type backbone variant_name",
    "model.width": "hidden_size hidden_dim dim d_model embed_dim emb_dim embedding_dim n_embd token_width",
    "model.depth": "layers num_layers n_layer n_layers num_hidden_layers num_blocks n_blocks encoder_layers",
    "model.heads": "num_heads n_head n_heads nhead num_attention_heads attention_heads",
    "model.mlp_width": "mlp_dim ffn_dim ff_dim dim_feedforward intermediate_size feedforward_dim",
    "model.registers": "num_registers n_registers register_tokens num_register_tokens reg_tokens",
    "model.layer_norm_epsilon": "layer_norm_eps ln_eps norm_eps",
    "model.dropout": "drop drop_rate dropout_rate hidden_dropout_prob proj_drop pos_drop",
    "model.attention_dropout": "attn_drop attn_dropout attn_drop_rate attention_probs_dropout_prob",
    "model.stochastic_depth": "drop_path drop_path_rate droppath drop_connect stoch_depth",
    "model.layer_scale": "init_values ls_init_value layerscale layer_scale_init_value",
    "model.scan": "scan_layers",
    "data.name": "dataset dataset_name data_name data_set ds",
    "data.dir": "data_dir data_path data_root dataset_dir dataset_path image_dir root train_dir",
    "data.image_size": "img_size image_resolution input_size resolution res imgsz crop_size input_shape",
    "data.workers": "num_workers dataloader_num_workers n_workers",
    "data.ahead": "prefetch prefetch_factor prefetch_to_device",
    "data.train": "train_split trainset train_set",
    "data.validation": "val val_split validation_split valid valid_split val_set eval_split",
    "data.held_out": "holdout hold_out test_size val_fraction validation_fraction",
    "data.test": "test_split test_set testset",
    "augment.flip": "hflip horizontal_flip random_flip flip_lr fliplr random_horizontal_flip",
    "augment.erasing": "reprob random_erasing random_erase re_prob cutout",
    "augment.mixup": "mixup_alpha",
    "augment.cutmix": "cutmix_alpha",
    "augment.mix_probability": "mixup_prob mix_prob mixup_p",
    "augment.mix_switch": "mixup_switch_prob switch_prob",
    "augment.rotation": "degrees rotate random_rotation",
    "augment.repeats": "aug_repeats repeated_aug num_repeats",
    "augment.crop_padding": "padding pad random_crop crop_pad",
    "augment.resized_crop": "random_resized_crop rrc inception_crop",
    "augment.test_flip": "tta",
    "optimizer.name": "opt optim optimizer optimizer_name optimizer_type optim_name solver",
    "optimizer.learning_rate": "lr base_lr peak_lr max_lr init_lr lr_base lr_max lr_peak initial_lr eta",
    "optimizer.final_learning_rate": "min_lr lr_min final_lr lr_final end_lr eta_min min_learning_rate",
    "optimizer.schedule": "sched scheduler lr_scheduler lr_schedule lr_scheduler_type decay_type",
    "optimizer.warmup_steps": "warmup num_warmup_steps warmup_iters lr_warmup",
    "optimizer.weight_decay": "wd l2 decay weight_decay_rate",
    "optimizer.beta1": "b1 adam_beta1 beta_1",
    "optimizer.beta2": "b2 adam_beta2 beta_2",
    "optimizer.epsilon": "eps adam_epsilon adam_eps opt_eps",
    "optimizer.layer_decay": "llrd layerwise_decay layerwise_lr_decay layer_wise_lr_decay",
    "optimizer.gradient_clip": "clip clip_grad clip_norm clipnorm grad_clip grad_clip_norm gradient_clip_val "
    "gradient_clipping max_grad_norm max_norm",
    "optimizer.average_decay": "ema_decay model_ema_decay ema_rate",
    "train.seed": "manual_seed random_seed random_state rng rng_seed",
    "train.seeds": "num_seeds n_seeds",
    "train.batch_size": "bs batch batchsize global_batch_size mini_batch_size minibatch per_device_train_batch_size "
    "train_batch_size",
    "train.evaluation_batch_size": "eval_batch_size val_batch_size test_batch_size per_device_eval_batch_size",
    "train.epochs": "epoch num_epochs n_epochs nb_epochs max_epochs total_epochs num_train_epochs training_epochs",
    "train.steps": "max_steps num_steps n_steps total_steps train_steps num_train_steps training_steps iters n_iters "
    "max_iters num_iterations iterations",
    "train.accumulation": "accum accum_iter accum_steps grad_accum grad_accum_steps gradient_accumulation "
    "gradient_accumulation_steps accumulate_grad_batches microbatches",
    "train.class_weights": "class_weight class_balance balanced",
    "train.label_smoothing": "smoothing label_smooth label_smoothing_factor ls",
    "train.masked_share": "mask_ratio masking_ratio mask_prob",
    "train.evaluate_every": "eval_every eval_steps eval_interval eval_freq val_every val_interval",
    "checkpoint.init_from": "finetune_from weights checkpoint_path initial_checkpoint pretrained_model load load_from "
    "model_init model_name_or_path pretrained_weights",
    "checkpoint.every": "save_every save_steps save_interval save_freq ckpt_every ckpt_steps checkpoint_every",
    "checkpoint.keep": "save_total_limit max_to_keep checkpoint_hist keep_checkpoints",
    "checkpoint.keep_best": "save_top_k save_best",
    "mesh.devices": "num_devices n_devices gpus num_gpus n_gpu n_gpus ngpu",
    "log.every": "log_every log_interval log_freq log_steps logging_steps log_every_n_steps print_freq",
    "log.profile": "profiler profiling trace",
}
# The same for options that take other values: another unit, or a name instead of True.
RELATED = {
    "model.variant": "patch patch_size model_size model.size size",
    "model.mlp_width": "mlp_ratio ffn_ratio expansion",
    "model.class_token": "cls_token cls use_cls use_class_token",
    "model.pooling": "pool global_pool gap pool_type classifier classifier_type",
    "model.position": "pos_embed pos_emb posemb posenc position_embedding positional_embedding rope",
    "model.pre_logits": "representation_size rep_size",
    "model.dtype": "amp amp_dtype precision mixed_precision half half_precision fp16 bf16 fp32 tf32 autocast "
    "compute_dtype",
    "model.remat": "grad_checkpointing gradient_checkpointing activation_checkpointing use_checkpoint checkpointing "
    "remat_policy",
    "model.attention_kernel": "flash flash_attention use_flash attn_implementation fused_attn sdpa xformers",
    "data.normalization": "normalize mean img_mean value_range",
    "data.resident": "in_memory cache_images preload",
    "augment.policy": "aa auto_augment autoaugment rand_aug randaug randaugment trivialaugment aug augmentation "
    "augmentations data_augmentation",
    "augment.brightness": "color_jitter jitter colorjitter",
    "augment.min_crop_area": "scale min_scale crop_scale crop_min",
    "augment.crop_ratio": "ratio aspect_ratio",
    "augment.erasing_mode": "remode",
    "augment.mix_per": "mixup_mode",
    "optimizer.learning_rate": "blr",
    "optimizer.warmup_steps": "warmup_epochs warmup_ratio warmup_lr",
    "optimizer.beta1": "betas opt_betas",
    "optimizer.average_decay": "ema model_ema use_ema swa polyak",
    "optimizer.trained": "linear_probe probe trainable unfreeze",
    "optimizer.frozen": "freeze freeze_backbone freeze_layers",
    "train.objective": "task pretext",
    "train.loss": "criterion loss_fn loss_type bce bce_loss",
    "train.evaluate_every": "eval_strategy evaluation_strategy val_check_interval check_val_every_n_epoch",
    "train.max_minutes": "max_time max_hours time_limit",
    "checkpoint.init_from": "pretrained finetune use_pretrained init ckpt checkpoint checkpoint.path",
    "mesh.devices": "device cuda accelerator",
    "mesh.distributed": "ddp world_size num_nodes nodes multihost strategy",
}
# What is not an option, or need not be.
NOTES = {
    "wandb use_wandb wandb_project report_to logger loggers mlflow trackio use_trackio comet neptune": "metrics are "
    "written to metrics.jsonl and for TensorBoard; for a tracker: config.log.tracker=wandb, mlflow or trackio",
    "early_stopping early_stop early_stopping_patience patience": "there is no early stopping; the checkpoint with the "
    "best validation result is kept: see config.checkpoint.keep_best",
    "out out_dir outdir output output_dir save_dir log_dir logdir work_dir run_dir exp_dir experiment_dir exp_name "
    "run_name experiment default_root_dir save_path": "set the run directory: --workdir=DIR",
    "resume auto_resume resume_from resume_from_checkpoint restore continue": "run the same command again, with the "
    "same --workdir: it resumes",
    "classes num_classes n_classes nb_classes num_labels": "omit it: the number of classes is that of the dataset",
    "channels in_channels in_chans num_channels": "omit it: the number of channels is that of the dataset",
    "deterministic benchmark cudnn_benchmark": "omit it: a run is determined by its config and config.train.seed",
    "shuffle": "omit it: training examples are always shuffled, in an order set by config.train.seed",
    "jit compile torch_compile torchcompile": "omit it: the training step is always compiled",
    "dry_run fast_dev_run debug limit_train_batches": "for a short run: --config.train.steps=20",
}


def _by_name(table: dict[str, str]) -> dict[str, str]:
    return {name: option for option, names in table.items() for name in names.split()}


_SAME, _RELATED = _by_name(SYNONYMS), _by_name(RELATED)
_OTHERS = _RELATED | _SAME
_NOTES = {name: text for names, text in NOTES.items() for name in names.split()}
_NAMES = [f"{section}.{key}" for section, keys in OPTIONS.items() for key in keys]


def nearest_options(name: str) -> list[str]:
    """Returns the options, as 'section.key', that a name which is none may mean; the most similar first."""
    section, key = _parts(name)
    sections = nearest(section, OPTIONS) if section else []
    # A name in the wrong section, or without one, is as frequent a mistake as a misspelled one.
    exact = [one for one in _NAMES if one.endswith(f".{key}")]
    found = [_OTHERS.get(f"{section}.{key}"), *sorted(exact, key=lambda one: one.split(".")[0] not in sections)]
    found.append(_OTHERS.get(key))
    if len(key) > 2:
        found += [f"{one}.{near}" for one in sections for near in nearest(key, OPTIONS[one], cutoff=0.7)]
        similar = nearest(key, [one.split(".")[1] for one in _NAMES], cutoff=0.75)
        found += [one for one in _NAMES if one.split(".")[1] in similar]
        found += [_OTHERS[near] for near in nearest(key, _OTHERS, cutoff=0.8)]
    return [one for one in dict.fromkeys(found) if one is not None]


def note(name: str) -> str | None:
    """Returns what to do instead of setting an option of other libraries; None if there is nothing to say."""
    return _NOTES.get(_parts(name)[1])


def takes_same_values(name: str, option: str) -> bool:
    """Returns whether the values of an unknown option are those of the option that it may mean."""
    key = _parts(name)[1]
    return option == _SAME.get(key) or (key not in _RELATED and bool(nearest(key, [option.split(".")[1]])))


def _parts(name: str) -> tuple[str, str]:
    """Returns section and key of a name, in lower case and with underscores."""
    spelled = name[:200].lower().replace("-", "_").removeprefix("config.").rstrip(".")
    above, _, key = spelled.rpartition(".")
    return above.rpartition(".")[2], key
