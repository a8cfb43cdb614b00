"""Settings of the commands beside `train`, in the same form as config.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fsdp_qlora.config.data import BaseSettings, DataSettings, RowSettings
from fsdp_qlora.config.lora import TrainedSettings


@dataclass(frozen=True)
class GenerateConfig:
    """Settings of one answer from a trained adapter, or from a model alone."""

    # --- model and prompt ---
    prompt: str
    """The user's message."""

    adapter: str | None = None
    """Folder of a trained adapter: the --output_dir of a training run; default: --model alone."""

    model: str | None = None
    """Base model (alias, hub id or local folder), or a model trained whole (the --output_dir of the run); default: the one
    the adapter was trained on."""

    revision: str | None = None
    """Branch, tag or commit of a hub model; default: the one of the training run, else the main branch."""

    # --- answer ---
    max_new_tokens: int = 128
    """Longest answer, in tokens."""

    temperature: float = 0.0
    """0: always the most likely token; above 0: sample, the higher the more varied."""

    seed: int = 42
    """Seed of the sampling."""

    # --- computation ---
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: on the GPU if there is one."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """dtype of the computation; auto: bf16 on GPUs, fp32 on CPUs."""

    debug: bool = False
    """Show Python tracebacks of errors."""


@dataclass(frozen=True)
class DataConfig(DataSettings):
    """Settings of a look at a dataset, as training would see it; no weights are read."""

    # --- run ---
    batch_size: int = 1
    """As in training: sequences per GPU and micro-batch."""

    gradient_accumulation_steps: int = 4
    """As in training: micro-batches per optimizer step."""

    gpus: int = 1
    """Ranks of the run."""

    # --- output ---
    num_samples: int = 3
    """Examples shown with what counts in the loss marked: the shortest, the longest, and others evenly between."""

    save_html: str | None = None
    """Save the report to this file as a page without external parts."""

    debug: bool = False
    """Show Python tracebacks of errors."""


@dataclass(frozen=True)
class DoctorConfig:
    """Settings of an examination of this machine."""

    # --- what to look at ---
    model: str | None = None
    """Also check that this model (alias, hub id or local folder) can be reached, and that its download has room."""

    disk_path: str | None = None
    """Folder whose disk is measured; default: where models of the hub are kept (HF_HOME)."""

    # --- output ---
    json: bool = False
    """Print one JSON object instead of lines."""

    debug: bool = False
    """Show Python tracebacks of errors."""


@dataclass(frozen=True)
class PlannedRun:
    """A model, a machine, and the sequences of a micro-batch."""

    # --- model ---
    model: str
    """Alias, hub id (only its config.json is fetched) or local folder with a config.json."""

    revision: str | None = None
    """Branch, tag or commit of a hub model; default: the main branch."""

    # --- machine ---
    gpus: int = 1
    """GPUs of a machine; one rank on each."""

    nodes: int = 1
    """Machines, all with as many GPUs."""

    gpu_memory: str = "24"
    """GiB of each GPU, or a comma-separated list with one size per GPU of a machine: the smallest decides."""

    cpu_memory: float = 64.0
    """GiB of RAM of each machine."""

    gpu_tflops: float = 100.0
    """Matrix products in 1e12 FLOP/s that a GPU sustains (a fast 24 GB gaming card: 100; H100: 500); for the time only."""

    host_bandwidth: float = 20.0
    """GB/s between host memory and a GPU (PCIe 4.0 x16: 20); for the time only."""

    link_bandwidth: float = 10.0
    """GB/s that a GPU gets from the others of its machine (without NVLink: 10); for the time only."""

    node_bandwidth: float = 1.0
    """GB/s that a machine gets from the others (10 Gb/s Ethernet: 1; 8 x 400 Gb/s InfiniBand: 300); for the time only."""

    # --- run ---
    context_length: int = 2048
    """Tokens per sequence."""

    batch_size: int = 1
    """Sequences per GPU and micro-batch."""


@dataclass(frozen=True)
class PlanConfig(BaseSettings, TrainedSettings, PlannedRun):
    """Settings of a planned run: what `plan` asks before anything is downloaded but the model's config.json."""

    # --- distribution and memory ---
    precision: Literal["bf16", "fp32"] = "bf16"
    """dtype of the computation."""

    sharding: Literal["full", "hybrid", "none"] = "full"
    """full: the base is sharded over all GPUs; hybrid: over those of each machine; none: every GPU holds all of it."""

    cpu_offload: str = "auto"
    """As in training: auto, none, all or a number of blocks."""

    activation_checkpointing: str = "auto"
    """As in training: auto, none, full or a number of blocks."""

    activation_offload: bool = False
    """As in training: keep the inputs of checkpointed blocks in CPU memory."""

    # --- output ---
    plot: str | None = None
    """Save a picture of the memory by component to this file (.png; needs matplotlib)."""

    debug: bool = False
    """Show Python tracebacks of errors."""


@dataclass(frozen=True)
class ReportConfig:
    """Settings of a page about finished or running trainings."""

    # --- runs ---
    runs: str
    """Run folders separated by commas; or without --runs, separated by spaces."""

    # --- output ---
    output: str = "report.html"
    """The page, a file without external parts."""

    png_dir: str | None = None
    """Folder for the charts as .png files; default: none are made."""

    debug: bool = False
    """Show Python tracebacks of errors."""


@dataclass(frozen=True)
class EvaluateConfig(RowSettings):
    """Settings of the evaluation of an adapter, or of a model alone."""

    # --- data ---
    dataset: str = "demo-test"
    """Dataset to evaluate on, in the same forms as in training."""

    # --- model ---
    adapter: str | None = None
    """Folder of a trained adapter, such as the --output_dir of a training run; default: --model alone."""

    model: str | None = None
    """Base model (alias, hub id or local folder), or a model trained whole (the --output_dir of the run); default: the one
    the adapter was trained on."""

    revision: str | None = None
    """Branch, tag or commit of a hub model; default: the one of the training run, else the main branch."""

    # --- answers ---
    exact_match: bool = False
    """Let the model answer, too, and count the answers that equal those of the dataset, apart from white space around."""

    max_new_tokens: int = 64
    """Tokens of an answer at most."""

    save_answers: str | None = None
    """With --exact_match: write questions, answers and references to this file, one JSON object a line."""

    # --- computation ---
    batch_size: int = 8
    """Sequences, and questions, per GPU at a time."""

    offload_blocks: int = 0
    """Decoder blocks whose 4-bit weights rest in pinned CPU memory, where the GPUs are too small for all."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto: on the GPU if there is one."""

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """dtype of the computation; auto: bf16 on GPUs, fp32 on CPUs."""

    timeout_s: int = 1800
    """Seconds a rank waits for the others."""

    debug: bool = False
    """Show Python tracebacks of errors."""
