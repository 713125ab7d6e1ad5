"""adq: quantization-aware training with adaptive codebooks and mixed precision.

After *Adaptive Distribution-aware Quantization for Mixed-Precision Neural Networks* (arXiv 2510.19760)::

    adq.quantize_(model, adq.ADQConfig(weight=adq.WeightConfig(bits=3)))
    adq.calibrate_(model, batches)
    table = adq.sensitivity(model, batches, loss_fn, bits=(2, 3, 4))
    adq.apply_allocation_(model, adq.allocate(table, adq.Budget(weight_bits=2.81)))
    ...  # any training loop
    adq.save(model, "model.safetensors")
"""

from adq import backends, functional
from adq.allocate import Allocation, Budget, allocate, apply_allocation_
from adq.artifact import load, save
from adq.batch_norm import correct_batch_norm_, reestimate_batch_norm_
from adq.calibrate import calibrate_
from adq.config import ActivationConfig, ADQConfig, LayerConfig, WeightConfig
from adq.convert import fast_linear_, pack_, quantize_
from adq.coreml import export_coreml
from adq.dampening import dampening_loss
from adq.distill import DistillationLoss
from adq.executorch import export_executorch
from adq.fold import fold_batch_norm_
from adq.integer import IntegerReport, to_integer
from adq.models import create_model, load_float_weights, register_architecture
from adq.onnx import export_onnx
from adq.parity import ExportReport, Parity
from adq.program import export_aoti, export_program
from adq.progressive import start_from_
from adq.report import report
from adq.sensitivity import LayerCost, SensitivityTable, sensitivity
from adq.summary import Summary, summary
from adq.update import step

__all__ = [
    "ADQConfig",
    "ActivationConfig",
    "Allocation",
    "Budget",
    "DistillationLoss",
    "ExportReport",
    "IntegerReport",
    "LayerConfig",
    "LayerCost",
    "Parity",
    "SensitivityTable",
    "Summary",
    "WeightConfig",
    "allocate",
    "apply_allocation_",
    "backends",
    "calibrate_",
    "correct_batch_norm_",
    "create_model",
    "dampening_loss",
    "export_aoti",
    "export_coreml",
    "export_executorch",
    "export_onnx",
    "export_program",
    "fast_linear_",
    "fold_batch_norm_",
    "functional",
    "load",
    "load_float_weights",
    "pack_",
    "quantize_",
    "reestimate_batch_norm_",
    "register_architecture",
    "report",
    "save",
    "sensitivity",
    "start_from_",
    "step",
    "summary",
    "to_integer",
]
