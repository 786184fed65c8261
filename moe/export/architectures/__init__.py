"""The architectures that carry our models, in the order in which an export tries them."""

from moe.export.architectures.deepseek_v3 import DEEPSEEK_V3
from moe.export.architectures.glm4_moe import GLM4_MOE
from moe.export.architectures.llama import LLAMA
from moe.export.architectures.mixtral import MIXTRAL
from moe.export.architectures.olmoe import OLMOE
from moe.export.architectures.qwen2 import QWEN2
from moe.export.architectures.qwen2_moe import QWEN2_MOE
from moe.export.architectures.qwen3 import QWEN3
from moe.export.architectures.qwen3_moe import QWEN3_MOE

ARCHITECTURES = (QWEN3_MOE, GLM4_MOE, OLMOE, MIXTRAL, QWEN2_MOE, DEEPSEEK_V3, QWEN3, LLAMA, QWEN2)
