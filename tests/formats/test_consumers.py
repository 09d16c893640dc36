"""mlx-lm on an export of a tiny model. Not in the default run: pip install 'mlx[cpu]' mlx-lm; pytest -m mlx.

llama.cpp is run by benchmarks/serving/verify.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import chat_model, chat_tokenizer, stirred_model

from tailora import LoRAConfig
from tailora.formats import export

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 8},
    "patterns": {"rank_pattern": {"q_proj": 3}, "alpha_pattern": {"v_proj": 40, "k_proj": 3}},
}


@pytest.mark.mlx
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_mlx_lm_computes_what_the_live_model_does(settings: dict[str, Any], tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core", reason="pip install 'mlx[cpu]' mlx-lm")
    mlx_lm = pytest.importorskip("mlx_lm", reason="pip install mlx-lm")
    base = chat_model()
    base.save_pretrained(tmp_path / "base")
    chat_tokenizer(["hello"]).save_pretrained(tmp_path / "base")
    model = stirred_model(base, LoRAConfig(**{"r": 4, **settings})).eval()
    model.export(tmp_path / "out", "mlx")
    ids = export.comparison_ids(base)
    mx.set_default_device(mx.cpu)
    theirs, _ = mlx_lm.load(str(tmp_path / "base"), adapter_path=str(tmp_path / "out"))
    theirs.set_dtype(mx.float32)
    tokens = np.array(theirs(mx.array(ids.numpy())))
    torch.testing.assert_close(torch.from_numpy(tokens), export.float32_logits(model, ids), rtol=1e-3, atol=1e-3)
