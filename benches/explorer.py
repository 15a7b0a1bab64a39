"""What an explorer of many latents costs beyond the encoding pass: CPU seconds of each part, and its size.

    python benches/explorer.py [N_LATENTS] [N_TOKENS]

A TopK crosscoder between two models of width 256 with random weights (k = 32); activations of the first `N_SKEWED` input
directions are larger, so that some latents fire often and many rarely; 8,192 tokens in the vocabulary.
"""

import cProfile
import pstats
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from crosscode.analysis.encoded import encode_heldout
from crosscode.analysis.records import study_records
from crosscode.analysis.report import contents, write_explorer
from crosscode.analysis.run_record import read_run
from crosscode.models import ModelHookpointAcausalCrosscoder, TopkActivation
from crosscode.models.architecture import split_for

D, V, S, K, N_SKEWED = 256, 8192, 128, 32, 32


@dataclass
class Batch:
    tokens_HS: torch.Tensor
    mask_HS: torch.Tensor
    acts_HSMPD: torch.Tensor


class Tokenizer:
    all_special_ids = ()
    all_special_tokens = ()

    def get_vocab(self):
        return {"\N{LOWER ONE EIGHTH BLOCK}a": 0}

    def convert_ids_to_tokens(self, token_id):
        return f"\N{LOWER ONE EIGHTH BLOCK}word{token_id}"


def batches(n_tokens: int) -> Iterator[Batch]:
    generator = torch.Generator().manual_seed(0)
    scale_D = torch.ones(D)
    scale_D[:N_SKEWED] = 4
    for _ in range(n_tokens // (32 * S)):
        tokens_HS = (torch.rand(32, S, generator=generator) ** 3 * V).long()
        acts_HSMPD = torch.randn(32, S, 2, 1, D, generator=generator) * scale_D
        yield Batch(tokens_HS, torch.ones(32, S, dtype=torch.bool), acts_HSMPD)


def main(n_latents: int, n_tokens: int) -> None:
    torch.manual_seed(0)
    model = ModelHookpointAcausalCrosscoder(2, 1, D, n_latents, TopkActivation(K, n_latents), backend="torch").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for part in model.parts:
            part.W_dec_LXoDo.copy_(torch.nn.functional.normalize(torch.randn_like(part.W_dec_LXoDo), dim=-1))
            part.W_enc_LXiDi.copy_(part.W_dec_LXoDo)
    split = split_for("model_hookpoint_acausal")
    W_VD = torch.randn(V, D)
    start = time.process_time()
    for _ in encode_heldout(model, batches(n_tokens), split):
        pass
    encoding = time.process_time() - start
    with tempfile.TemporaryDirectory() as folder, cProfile.Profile() as profile:
        run = Path(folder)
        (run / "config.yaml").write_text("name: bench")
        start = time.process_time()
        study, records = study_records(
            model, batches(n_tokens), split, ["base/h", "tuned/h"], dict.fromkeys((0, 1), lambda v_ND: v_ND @ W_VD.T)
        )
        passed = time.process_time() - start
        tokenizer = Tokenizer()
        shown = contents(read_run(run), study, tokenizer)
        write_explorer(run / "report", shown, study, records, tokenizer, {})
        all_ = time.process_time() - start
        size = sum(path.stat().st_size for path in (run / "report").rglob("*") if path.is_file())
    pstats.Stats(profile).sort_stats("cumulative").print_stats(r"crosscode|built-in", 45)
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)
    print(f"{n_latents:,} latents, {n_tokens:,} tokens; CPU seconds, profiler included:")
    print(f"encoding {encoding:.1f}; the rest of the pass {passed - encoding:.1f}; writing {all_ - passed:.1f}")
    print(f"report/: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(*(int(number) for number in sys.argv[1:])) if len(sys.argv) > 1 else main(16_384, 49_152)
