"""The graph whose latency counts: plain or a decoder with its cache, in the precision that ships."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from deploy_prune.precision_options import Precision

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from converters.variants import Variant
    from deploy_prune.signature import Signature


@dataclass(frozen=True)
class Graph:
    """Writes models as graphs to be timed: `Graph(task.signature)(model, file)`.

    `cache`: a decoder with its key/value cache takes the place of the signature's graph, with `last_logits` as in
    `export_decoder`. `precision`: it is converted, with the options of `write_timed` and, for int8-static, `batches`.
    """

    signature: Signature
    opset: int = 18
    variant: Variant = "plain"
    cache: bool = False
    last_logits: bool = False
    precision: Literal["fp32", Precision] = "fp32"
    options: Mapping[str, Any] = field(default_factory=dict)
    batches: Sequence[Mapping[str, np.ndarray]] = ()

    def __call__(self, model: nn.Module, file: Path) -> None:
        """Raises as `export_onnx` and, of a conversion, as `write_timed`."""
        if self.precision == "fp32":
            return self._export(model, file)
        from converters.precision.timed import write_timed

        twin = file.with_name(f"{file.stem}.fp32.onnx")
        self._export(model, twin)
        write_timed(twin, file, self.precision, self._batches(twin), **self.options)
        twin.unlink()

    def _batches(self, twin: Path) -> Sequence[Mapping[str, np.ndarray]]:
        """`batches` with the empty caches that this decoder takes."""
        if not (self.cache and self.batches):
            return self.batches
        from converters.generation import OnnxDecoder

        decoder = OnnxDecoder(twin)
        return [{**texts, **decoder.empty(len(texts["input_ids"]))} for texts in self.batches]

    @property
    def form(self) -> str:
        """A name that graphs share only when the same model gives the same nodes: tables are kept under it."""
        parts = [self.variant, str(self.opset), *["cache"] * self.cache, *["last"] * self.last_logits]
        if self.precision != "fp32":
            options = json.dumps(dict(self.options), sort_keys=True, default=str)
            parts += [self.precision, hashlib.sha256(options.encode()).hexdigest()[:8]]
        return "-".join(parts)

    def _export(self, model: nn.Module, file: Path) -> None:
        if self.cache:
            from converters.decoder_export import export_decoder_graph

            export_decoder_graph(model, file, opset=self.opset, variant=self.variant, last_logits=self.last_logits)
        else:
            from converters.onnx_export import export_onnx

            export_onnx(model, file, self.signature, opset=self.opset, variant=self.variant)
