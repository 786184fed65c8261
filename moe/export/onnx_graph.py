"""An ONNX graph that is built operator by operator, its matrices in a file beside it.

model.onnx        operators, and vectors
model.onnx.data   matrices, each from a page's border on, as engines map them into memory
"""

from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import TensorProto, helper

MODEL, DATA = "model.onnx", "model.onnx.data"
PAGE = 4096
STANDARD = 21  # version of ONNX's own operators
# Of ONNX Runtime (com.microsoft): onnxruntime/docs/ContribOperators.md.
CONTRIBUTED = {"GroupQueryAttention", "MoE", "QMoE", "MatMulNBits"}
TYPES = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.uint8): TensorProto.UINT8}
Shape = tuple[int | str, ...]


class Graph:
    """Operators in the order in which they were added.

    Args:
        data: the file for matrices, at its beginning.
    """

    def __init__(self, data: BinaryIO):
        self._data = data
        self._nodes: list[onnx.NodeProto] = []
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []
        self._constants: dict[str, TensorProto] = {}

    def input(self, name: str, kind: int, shape: Shape) -> str:
        """What the caller gives; words in a shape are sizes that may vary."""
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, kind: int, shape: Shape) -> None:
        """A value that the caller gets."""
        self._outputs.append(helper.make_tensor_value_info(name, kind, shape))

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """One operator; gives the name of its output.

        Args:
            operator: its type.
            inputs: names; an empty one for an input that is left out.
            attributes: of the operator.
        """
        output = f"{operator}_{len(self._nodes)}"
        self.add_named(operator, *inputs, outputs=[output], **attributes)
        return output

    def add_named(self, operator: str, *inputs: str, outputs: list[str], **attributes: Any) -> None:
        """One operator, its outputs under these names."""
        domain = "com.microsoft" if operator in CONTRIBUTED else ""
        self._nodes.append(
            helper.make_node(operator, list(inputs), outputs, name=outputs[0], domain=domain, **attributes)
        )

    def integers(self, *values: int) -> str:
        """A vector of int64, such as a shape or axes."""
        name = f"integers {values}"
        self._constants.setdefault(name, helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def number(self, value: float) -> str:
        """A scalar of float32."""
        name = f"number {value}"
        self._constants.setdefault(name, helper.make_tensor(name, TensorProto.FLOAT, [], [value]))
        return name

    def array(self, name: str, array: np.ndarray) -> str:
        """A vector, kept in the graph, or a matrix, written to the file; float32 or uint8."""
        array = np.ascontiguousarray(array)
        tensor = TensorProto(name=name, data_type=TYPES[array.dtype], dims=array.shape)
        if array.ndim < 2:
            tensor.raw_data = array.tobytes()
        else:
            self._data.write(bytes(-self._data.tell() % PAGE))
            place = {"location": DATA, "offset": self._data.tell(), "length": array.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            tensor.data_location = TensorProto.EXTERNAL
            self._data.write(array)
        assert name not in self._constants, name
        self._constants[name] = tensor
        return name

    def save(self, path: Path, name: str) -> None:
        """Write all but the matrices, which are there already."""
        graph = helper.make_graph(
            self._nodes, name, self._inputs, self._outputs, list(self._constants.values())
        )
        versions = [helper.make_opsetid("", STANDARD), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=versions, ir_version=10, producer_name="switchyard")
        path.write_bytes(model.SerializeToString())
