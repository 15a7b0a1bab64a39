"""Other libraries, as a command wants them."""

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Keep the libraries' own bars, warnings and retries off the screen; ours say what takes time and what is wrong.

    `CROSSCODE_VERBOSE=1` in the environment leaves them as they are.
    """
    if os.environ.get("CROSSCODE_VERBOSE"):
        return
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("huggingface_hub", "datasets", "transformers", "httpx", "urllib3", "filelock", "fsspec"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(transformers|datasets|huggingface_hub|transformer_lens|torch)\b.*")
