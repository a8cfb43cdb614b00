"""What other trainers call the settings of this one, for the hint on an unknown name."""

from __future__ import annotations

_OURS = {
    "model": "model_name model_name_or_path model_id base_model pretrained_model_name_or_path",
    "dataset": "data dataset_name dataset_path data_path train_file datasets",
    "eval_split": "val_set_size test_size val_split validation_split",
    "context_length": "max_seq_length max_seq_len max_length seq_length seq_len sequence_len cutoff_len model_max_length",
    "packing": "sample_packing",
    "lora_rank": "lora_r r rank",
    "lora_alpha": "alpha",
    "lora_target_modules": "target_modules lora_modules",
    "batch_size": "per_device_train_batch_size micro_batch_size per_device_eval_batch_size",
    "gradient_accumulation_steps": "grad_accum grad_accumulation accumulation_steps gradient_accumulation",
    "num_epochs": "epochs num_train_epochs",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type scheduler",
    "warmup_ratio": "warmup_steps num_warmup_steps",
    "max_grad_norm": "grad_norm gradient_clip_val gradient_clipping",
    "precision": "dtype torch_dtype bf16 fp16 mixed_precision",
    "quant_type": "load_in_4bit bnb_4bit_quant_type",
    "double_quant": "bnb_4bit_use_double_quant",
    "sharding": "sharding_strategy fsdp",
    "cpu_offload": "use_cpu_offload offload",
    "activation_checkpointing": "gradient_checkpointing use_gradient_checkpointing",
    "activation_offload": "use_activation_cpu_offload",
    "log_to": "report_to",
    "resume": "resume_from_checkpoint",
    "output_dir": "output out_dir save_dir out",
    "prompt": "text question input",
}

OTHER_NAMES = {other: ours for ours, others in _OURS.items() for other in others.split()}
"""Ours by the other's."""
