"""Descriptions of GPUs, to compile for them on machines without one."""

import dataclasses

GB = 10**9
KIB, MIB, GIB = 2**10, 2**20, 2**30


@dataclasses.dataclass(frozen=True)
class Device:
    """The properties of a GPU that XLA needs to compile for it.

    Attributes:
        name: the `device_kind` in JAX, by which `hardware.peak` finds its FLOP/s.
        capability: CUDA compute capability, (major, minor).
        cores: streaming multiprocessors (SMs).
        memory: bytes.
        bandwidth: of the memory, in bytes per second.
        l2: bytes of the L2 cache.
        shared_per_core: bytes of shared memory per SM.
        shared_per_block: maximum bytes of shared memory per block.
        clock: boost clock in GHz.
        threads_per_core: maximum number of resident threads per SM.
        units_per_core: float32 units per SM.
    """

    name: str
    capability: tuple[int, int]
    cores: int
    memory: int
    bandwidth: int
    l2: int
    shared_per_core: int
    shared_per_block: int
    clock: float
    threads_per_core: int = 2048
    units_per_core: int = 128

    def target_config(self) -> str:
        """The text of XLA's GpuTargetConfigProto; fields that all of these GPUs share are constants here."""
        major, minor = self.capability
        return f"""
            gpu_device_info {{
              threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {self.threads_per_core}
              block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_per_core}
              shared_memory_per_block_optin: {self.shared_per_block}
              core_count: {self.cores} fpus_per_core: {self.units_per_core} clock_rate_ghz: {self.clock}
              memory_bandwidth: {self.bandwidth} device_memory_size: {self.memory} l2_cache_size: {self.l2}
              cuda_compute_capability {{ major: {major} minor: {minor} }}
            }}
            platform_name: "CUDA"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            device_description_str: "{self.name}"
        """


# SMs, memory, bandwidth and clock: NVIDIA's data sheets and architecture white papers of each product (SXM versions
# where there are several); caches and shared memory: the white papers and the CUDA programming guide's table of
# compute capabilities. XLA's own descriptions (xla/backends/gpu/target_config/specs) agree for the devices in them.
DEVICES = {
    "H200": Device(
        "NVIDIA H200", (9, 0), 132, 141 * GIB, 4800 * GB, 50 * MIB, 228 * KIB, 227 * KIB, 1.98
    ),
    "H100": Device(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 80 * GIB, 3350 * GB, 50 * MIB, 228 * KIB, 227 * KIB, 1.98
    ),
    "A100": Device(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 80 * GIB, 2039 * GB, 40 * MIB, 164 * KIB, 163 * KIB, 1.41, 2048, 64
    ),
    "L40S": Device(
        "NVIDIA L40S", (8, 9), 142, 48 * GIB, 864 * GB, 96 * MIB, 100 * KIB, 99 * KIB, 2.52, 1536
    ),
    "B200": Device(
        "NVIDIA B200", (10, 0), 148, 180 * GIB, 7700 * GB, 126 * MIB, 228 * KIB, 227 * KIB, 1.965
    ),
}  # fmt: skip
