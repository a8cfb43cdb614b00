"""The independent implementation that parity is measured against, and what is compared.

The reference is transformers' model loaded by `from_pretrained` with bitsandbytes' 4-bit layers, eager attention with dense
masks, and PEFT's LoRA. Nothing of fsdp_qlora takes part in it but the values of the LoRA matrices, which are copied.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import bitsandbytes as bnb
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel

import tests.bnb_cpu  # noqa: F401
from fsdp_qlora import data
from fsdp_qlora.build import BuiltModel, build_model
from fsdp_qlora.config import TrainConfig
from fsdp_qlora.distributed import Ranks
from fsdp_qlora.models.hub import resolve
from fsdp_qlora.models.skeleton import read_config
from fsdp_qlora.models.vocabulary import trained_vocabularies
from fsdp_qlora.parallel import MemorySettings
from fsdp_qlora.quant.adapt import LoraSettings, QuantSettings, lora_layers, lora_linears, packed_layers
from fsdp_qlora.quant.dequantize import dequantize
from fsdp_qlora.quant.expert_lora import ExpertLora
from fsdp_qlora.quant.experts import ExpertStack
from fsdp_qlora.quant.lora import ALL_LINEAR, EXPERTS, is_names
from tests.batches import make_trainer, unpacked_loader

LORA = LoraSettings(rank=8, alpha=16.0)
NF4 = QuantSettings()
SMOLLM2_LR = 2e-4


@dataclass
class Pair:
    """The same checkpoint and adapter twice: in fsdp_qlora, as training uses it, and in the reference."""

    folder: Path
    ours: BuiltModel
    peft: PeftModel


def load_base(
    folder: Path, quant: QuantSettings, dtype: torch.dtype, auto_class: type = AutoModelForCausalLM
) -> PreTrainedModel:
    """Return transformers' model on the CPU, with bitsandbytes' 4-bit layers unless it is not to be quantised."""
    config = None
    if quant.is_4bit:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=quant.quant_type,
            bnb_4bit_use_double_quant=quant.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    model = auto_class.from_pretrained(
        folder, quantization_config=config, dtype=dtype, device_map={"": "cpu"}, attn_implementation="eager"
    )
    if quant.is_4bit:
        _round_experts(model, quant)
    return model


@torch.no_grad()
def _round_experts(model: PreTrainedModel, quant: QuantSettings) -> None:
    """Replace experts' matrices, which transformers leaves in 16 or 32 bits, by what bitsandbytes makes of each."""
    for module in model.modules():
        gate_up, down = getattr(module, "gate_up_proj", None), getattr(module, "down_proj", None)
        if isinstance(gate_up, nn.Parameter) and isinstance(down, nn.Parameter):
            for matrix in itertools.chain(*(expert.chunk(2) for expert in gate_up), down):
                settings = {"quant_type": quant.quant_type, "compress_statistics": quant.double_quant}
                matrix.copy_(bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(matrix, **settings)))


def load_ours(
    folder: Path,
    ranks: Ranks,
    quant: QuantSettings = NF4,
    lora: LoraSettings = LORA,
    dtype: torch.dtype = torch.float32,
    zero_lora_B: bool = False,
    recompute: bool = True,
) -> BuiltModel:
    """Load a checkpoint as training does, with random values in lora_B unless it is to stay zero."""
    num_blocks = read_config(folder)[0].num_hidden_layers
    memory = MemorySettings(checkpoint_blocks=num_blocks if recompute else 0)
    built = build_model(folder, ranks, quant, lora, dtype, memory=memory)
    generator = torch.Generator().manual_seed(1)
    for layer in lora_layers(built.root):
        if not zero_lora_B:
            value = local(layer.lora_B)
            value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    for _, module in trained_vocabularies(built.root.model):
        rows = local(module.weight)
        rows += torch.randn(rows.shape, generator=generator) * 0.05
    return built


def load_pair(
    folder: Path,
    ranks: Ranks,
    quant: QuantSettings = NF4,
    lora: LoraSettings = LORA,
    dtype: torch.dtype = torch.float32,
    zero_lora_B: bool = False,
) -> Pair:
    """Load a checkpoint both ways, with the same LoRA matrices."""
    ours = load_ours(folder, ranks, quant, lora, dtype, zero_lora_B)
    if any(isinstance(layer, ExpertStack) for layer in packed_layers(ours.root)) and lora.target_modules == ALL_LINEAR:
        # PEFT's own all-linear takes experts and router too
        lora = replace(
            lora, target_modules=",".join({layer.name.rpartition(".")[2] for layer in lora_linears(ours.root)})
        )
    # in train mode for good: in eval mode bitsandbytes repacks the weights of some CPUs and computes in bf16
    peft = get_peft_model(load_base(folder, quant, dtype), peft_config(lora, ours.skeleton.tied)).train()
    named = dict(peft.named_parameters())
    for name, parameter in trained_by_pefts_names(ours):
        named[name].data.copy_(local(parameter))
    return Pair(folder, ours, peft)


def peft_config(lora: LoraSettings, tied: bool = False) -> LoraConfig:
    """Return the same settings for PEFT, for a base whose head is its embedding or is not."""
    whole = lora.target_modules == ALL_LINEAR or not is_names(lora.target_modules)
    experts = lora.target_parameters
    if experts == (EXPERTS,):
        experts = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
    if lora.layers is not None:  # PEFT's layers_to_transform is for modules only
        experts = tuple(f"model.layers.{block}.{name}" for block in lora.layers for name in experts)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules if whole else lora.target_modules.split(","),
        target_parameters=list(experts) or None,
        layers_to_transform=None if lora.layers is None else list(lora.layers),
        rank_pattern={pattern: int(rank) for pattern, rank in lora.rank_pattern},
        alpha_pattern=dict(lora.alpha_pattern),
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        modules_to_save=list(lora.modules_to_save) or None,
        ensure_weight_tying=tied and bool(lora.modules_to_save),
        task_type="CAUSAL_LM",
    )


def peft_name(layer: str, part: str) -> str:
    """Return PEFT's name of a LoRA matrix, or of a module that is trained whole, in memory."""
    return f"base_model.model.{layer}.{part}.default.weight"


def trained_by_pefts_names(built: BuiltModel) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield all that is trained, with PEFT's names in memory."""
    layers = {layer.name: layer for layer in lora_layers(built.root)}
    for name, layer in layers.items():
        wrapper = name
        if isinstance(layer, ExpertLora):  # PEFT wraps the module, once more for the second parameter
            experts, _, parameter_name = name.rpartition(".")
            is_inner = parameter_name == "gate_up_proj" and f"{experts}.down_proj" in layers
            wrapper = f"{experts}.base_layer" if is_inner else experts
        for part, parameter in layer.adapter():
            yield peft_name(wrapper, part), parameter
    for name, module in trained_vocabularies(built.root.model):
        yield peft_name(name, "modules_to_save"), module.weight


def local(parameter: Tensor | None) -> Tensor:
    """Return the values of a parameter in a world of one; writing to them changes the parameter."""
    assert parameter is not None
    value = parameter.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def differing_base_weights(pair: Pair) -> list[str]:
    """Return the layers whose dequantised matrices are not bitwise equal, or that only one of the two has."""
    found = {linear.name: linear for linear in lora_linears(pair.ours.root)}
    expected = {
        name.removeprefix("base_model.model.").removesuffix(".base_layer"): module.weight
        for name, module in pair.peft.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }
    wrong = sorted(set(found) ^ set(expected))
    for name in set(found) & set(expected):
        linear, weight = found[name], expected[name]
        matrix = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        if not dequantize(local(linear.packed), linear.layout, matrix.dtype, "forward").equal(matrix):
            wrong.append(name)
    return wrong + _differing_experts(pair)


def _differing_experts(pair: Pair) -> list[str]:
    """Return the experts' matrices whose dequantised values are not bitwise equal to bitsandbytes'."""
    wrong = []
    for stack in packed_layers(pair.ours.root):
        if not isinstance(stack, ExpertStack):
            continue
        experts, _, part = stack.name.rpartition(".")
        module = pair.peft.base_model.model.get_submodule(experts)
        half = {"gate_proj": 0, "up_proj": 1}.get(part)
        for expert, name in enumerate(stack.matrix_names()):
            expected = module.down_proj[expert] if half is None else module.gate_up_proj[expert].chunk(2)[half]
            section = stack.layout.matrix_range(expert)
            packed = local(stack.packed).view(torch.uint8)[section.start : section.stop]
            if not dequantize(packed, stack.layout, expected.dtype, "forward").equal(expected):
                wrong.append(name)
    return wrong


def smollm2(ranks: Ranks, context_length: int) -> tuple[Pair, data.Loader]:
    """Return the real SmolLM2-135M both ways and 50 conversations of the demo data, one a step, every token a target.

    With the two or three tokens of an answer alone as targets, the matrix product of loss and head has as many rows, and
    MKL adds up such products over the vocabulary with up to a hundred times the rounding error of larger ones.
    """
    folder = resolve("smollm2-135m")
    config = TrainConfig(dataset="demo", context_length=context_length, packing=False, train_on="all")
    (examples,) = data.load_splits(config, AutoTokenizer.from_pretrained(folder)).train.stores
    pair = load_pair(folder, ranks, zero_lora_B=True)
    return pair, unpacked_loader([examples[i] for i in range(50)], context_length, batch_size=1)


@contextmanager
def captured_hidden(built: BuiltModel) -> Iterator[list[Tensor]]:
    """Collect the final hidden states [batch, tokens, hidden] of every call of the root."""
    found: list[Tensor] = []
    norm = built.skeleton.decoder.norm
    handle = norm.register_forward_hook(lambda module, args, output: found.append(output))
    try:
        yield found
    finally:
        handle.remove()


@torch.no_grad()
def logits(built: BuiltModel, ranks: Ranks, batch: data.Batch) -> Tensor:
    """Return fsdp_qlora's logits [batch, tokens, vocabulary], float32, from the code that training runs."""
    with captured_hidden(built) as hidden:
        make_trainer(built, ranks).loss(batch)
    values = F.linear(hidden[0], local(built.root.vocabulary.weight)).float() * built.skeleton.logit_scale
    cap = built.skeleton.logit_softcap
    return values if cap is None else torch.tanh(values / cap) * cap


@torch.no_grad()
def token_losses(built: BuiltModel, ranks: Ranks, batch: data.Batch) -> Tensor:
    """Return the loss of every position [batch, tokens], 0 where there is no target."""
    scores = logits(built, ranks, batch)
    return F.cross_entropy(scores.transpose(1, 2), batch.labels, ignore_index=-100, reduction="none")


@dataclass
class Gradients:
    """Loss per token and gradients by PEFT's names of one batch."""

    loss: float
    grads: dict[str, Tensor]


def our_gradients(built: BuiltModel, ranks: Ranks, batch: data.Batch) -> Gradients:
    """Run forward and backward of fsdp_qlora."""
    built.root.train()
    loss = make_trainer(built, ranks).loss(batch) / batch.num_targets
    loss.backward()
    grads = {}
    for name, parameter in trained_by_pefts_names(built):
        grads[name] = local(parameter.grad).clone()
        parameter.grad = None
    return Gradients(loss.item(), grads)


def reference_gradients(peft: PeftModel, ids: Tensor) -> Gradients:
    """Run forward and backward of the reference on ids [batch, tokens], one document a row."""
    loss = peft(input_ids=ids, labels=ids).loss
    loss.backward()
    grads = {name: p.grad.clone() for name, p in peft.named_parameters() if p.requires_grad}
    peft.zero_grad()
    return Gradients(loss.item(), grads)


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference divided by the largest expected magnitude."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def gradient_distance(found: Gradients, expected: Gradients) -> float:
    """Return the norm of the gradients' difference over the norm expected; for bf16, whose single values vary."""
    apart = sum((found.grads[name].double() - grad.double()).square().sum() for name, grad in expected.grads.items())
    whole = sum(grad.double().square().sum() for grad in expected.grads.values())
    assert isinstance(apart, Tensor)
    return float((apart / whole).sqrt())


def max_gradient_difference(found: Gradients, expected: Gradients) -> float:
    """Return the largest relative difference over the LoRA matrices; they must be the same ones."""
    assert set(found.grads) == set(expected.grads)
    return max(relative_difference(found.grads[name].float(), grad.float()) for name, grad in expected.grads.items())


@dataclass
class Curves:
    """Mean loss per target token of every optimizer step.

    PEFT's is computed in float64 from its logits: with logits as large as SmolLM2's (38) PyTorch's cross-entropy in float32
    is 2e-6 from that on CPUs, and its gradient 1e-5; ours are 1e-7 and 2e-7.
    """

    ours: list[float] = field(default_factory=list)
    peft: list[float] = field(default_factory=list)

    @property
    def max_deviation(self) -> float:
        """Largest relative difference of a step's losses."""
        return max(abs(a - b) / b for a, b in zip(self.ours, self.peft, strict=True))


def train_both(
    pair: Pair, ranks: Ranks, loader: data.Loader, num_steps: int, lr: float, lr_ratio: float = 1.0
) -> Curves:
    """Train both on the loader's steps, which must not be packed: AdamW, constant rate, gradient norm clipped to 1.

    Args:
        lr_ratio: that of LoRA+.
    """
    curves = Curves()
    trainer = make_trainer(pair.ours, ranks, loader, max_steps=num_steps, lr=lr, loraplus_lr_ratio=lr_ratio)
    trainable = [p for p in pair.peft.parameters() if p.requires_grad]
    optimizer = create_loraplus_optimizer(pair.peft, torch.optim.AdamW, lr=lr, loraplus_lr_ratio=lr_ratio)
    epoch, index = 0, 0
    for step in range(num_steps):
        if index == loader.num_steps(epoch):
            epoch, index = epoch + 1, 0
        batches = loader.step(epoch, index)
        index += 1
        curves.ours.append(trainer.train_step(batches, step).loss)
        curves.peft.append(_reference_step(pair.peft, optimizer, trainable, batches))
    return curves


def _reference_step(
    peft: PeftModel, optimizer: torch.optim.Optimizer, trainable: list[nn.Parameter], batches: list[data.Batch]
) -> float:
    num_targets = sum(batch.num_targets for batch in batches)
    total = 0.0
    for batch in batches:
        # positions and mask are transformers' own: right padding is behind every target
        scores = peft(input_ids=batch.input_ids).logits.flatten(0, 1).double()
        loss = F.cross_entropy(scores, batch.labels.flatten(), ignore_index=-100, reduction="sum") / num_targets
        loss.backward()
        total += loss.item()
    torch.nn.utils.clip_grad_norm_(trainable, 1.0)
    optimizer.step()
    optimizer.zero_grad()
    return total
