"""Quantization methods as Transformers keeps them in a running model's config."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from transformers import AwqConfig, BitsAndBytesConfig
from transformers.utils.quantization_config import QuantizationMethod

from lmeval_ext.models.hf.loading import quant_method


@pytest.mark.parametrize("method", list(QuantizationMethod))
def test_quant_method_of_a_running_model_is_the_name_in_checkpoints(method: QuantizationMethod) -> None:
    name = quant_method(SimpleNamespace(quantization_config={"quant_method": method}))
    assert type(name) is str
    assert name == method.value


def test_quant_method_of_config_objects_is_the_name_in_checkpoints() -> None:
    assert quant_method(SimpleNamespace(quantization_config=AwqConfig(bits=4))) == "awq"
    assert quant_method(SimpleNamespace(quantization_config=BitsAndBytesConfig(load_in_4bit=True))) == "bitsandbytes"
    assert quant_method(SimpleNamespace(quantization_config=None)) is None
    assert quant_method(SimpleNamespace()) is None
