"""The explorer in a real browser, from disk: search, sort, deep links, keys, and nothing of a hostile run that runs."""

import json
from dataclasses import dataclass

import browser
import pytest
import torch

from crosscode.analysis.records import study_records
from crosscode.analysis.report import contents, write_explorer
from crosscode.analysis.run_record import read_run
from crosscode.models import ModelHookpointAcausalCrosscoder, TopkActivation
from crosscode.models.architecture import split_for

pytestmark = pytest.mark.skipif(bool(browser.MISSING), reason=f"the explorer in a browser: {browser.MISSING}")
EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>"
N_LATENTS = 300


@dataclass
class Batch:
    tokens_HS: torch.Tensor
    mask_HS: torch.Tensor
    acts_HSMPD: torch.Tensor


class HostileTokenizer:
    all_special_ids = ()
    all_special_tokens = ()

    def get_vocab(self):
        return {"\N{LOWER ONE EIGHTH BLOCK}a": 0}

    def convert_ids_to_tokens(self, token_id):
        return f"\N{LOWER ONE EIGHTH BLOCK}{EVIL}" if token_id == 7 else f"\N{LOWER ONE EIGHTH BLOCK}word{token_id}"


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    (run / "config.yaml").write_text(f"name: '{EVIL}'")
    torch.manual_seed(0)
    model = ModelHookpointAcausalCrosscoder(2, 1, 8, N_LATENTS, TopkActivation(8, N_LATENTS), backend="torch").eval()
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape)
    tokens_HS = torch.randint(0, 20, (40, 60))
    heldout = [Batch(tokens_HS, torch.ones(40, 60, dtype=torch.bool), torch.randn(40, 60, 2, 1, 8))]
    W_VD = torch.randn(20, 8)
    split = split_for("model_hookpoint_acausal")
    names = [f"{EVIL}/h", "tuned/h"]
    study, records = study_records(
        model, heldout, split, names, dict.fromkeys(range(len(names)), lambda v_ND: v_ND @ W_VD.T)
    )
    tokenizer = HostileTokenizer()
    shown = contents(read_run(run), study, tokenizer)
    write_explorer(run / "report", shown, study, records, tokenizer, {})
    return (run / "report" / "index.html").as_uri()


ROWS = "[...document.querySelectorAll('.tabulator-row')].map(row => Number(row.querySelector('a').textContent))"


@pytest.fixture(params=[1200, 400])
def window(request, page):
    with browser.Browser(width=request.param) as opened:
        opened.open(page)
        yield opened
        assert opened.errors() == []
        assert opened.run("return document.querySelectorAll('img').length") == 0
        assert opened.run("return document.documentElement.scrollWidth <= innerWidth")


def test_all_latents_are_searched_sorted_and_linked(window, page):
    window.open(f"{page}#/latents")
    window.wait("document.getElementById('found').textContent.startsWith('300 of 300')")
    window.run("document.getElementById('sort').value = 'firings'; sort.dispatchEvent(new Event('change'));")
    window.run("document.getElementById('dir').value = 'desc'; dir.dispatchEvent(new Event('change'));")
    window.wait("location.hash.includes('sort=firings') && location.hash.includes('dir=desc')")
    window.run("search.value = 'firings>0 word3'; search.dispatchEvent(new Event('input'));")
    window.wait("location.hash.includes('q=')")
    link = window.run("return location.href")
    shown = window.run(f"return {ROWS}")
    assert 0 < len(shown) < N_LATENTS
    window.open("about:blank")
    window.open(link)
    window.wait(f"JSON.stringify({ROWS}) === {json.dumps(json.dumps(shown, separators=(',', ':')))}")
    window.run("document.querySelector('.tabulator-row a').click()")
    window.wait(f"document.getElementById('latent').dataset.latent == {shown[0]}")
    window.run("document.body.dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowRight', bubbles: true}))")
    window.wait(f"document.getElementById('latent').dataset.latent == {shown[1]}")


def test_a_latent_shows_hostile_tokens_as_text(window, page):
    window.open(f"{page}#/latents?q=onerror")
    window.wait(f"{ROWS}.length > 0")
    window.run("document.querySelector('.tabulator-row a').click()")
    window.wait("document.querySelectorAll('#latent .snippets li').length > 0")
    assert window.run("return document.getElementById('latent').textContent.includes('onerror=alert(1)')")
    assert window.run("return document.querySelectorAll('#latent .peak').length > 0")
    marked = "document.querySelector('#latent li:has(.more:not([hidden]))').className = 'was'"
    length = "return document.querySelector('#latent li.was code').textContent.length"
    before = window.run(f"{marked}; {length}")
    window.run("document.querySelector('#latent li.was .more').click()")
    assert window.run(length) > before
    window.run("document.querySelector('#latent .peak').focus()")
    hint = window.run("return document.querySelector('#hint:not([hidden])').textContent").splitlines()
    assert [line.split(maxsplit=1)[0] for line in hint] == ["activation", "reads:", "writes"]
    assert hint[1].startswith(f"reads: {EVIL} ") and ", tuned " in hint[1]
    box = "const box = document.getElementById('hint').getBoundingClientRect(); "
    assert window.run(f"{box} return box.left >= 0 && box.right <= innerWidth && box.bottom <= innerHeight")


def test_a_note_is_kept_in_the_browser(window, page):
    window.open(f"{page}#/latent/5")
    window.wait("document.getElementById('note')")
    window.run("note.value = 'mine'; note.dispatchEvent(new Event('change'))")
    window.wait("document.getElementById('saved').textContent.startsWith('saved')")
    window.open("about:blank")
    window.open(f"{page}#/latent/5")
    window.wait("document.getElementById('note')?.value === 'mine'")


def test_no_such_latent_is_said(window, page):
    window.open(f"{page}#/latent/9999")
    window.wait("document.getElementById('latent').textContent.includes('There is no latent 9999')")
