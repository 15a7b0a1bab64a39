"""Other libraries, as a command wants them."""


def quiet_libraries() -> None:
    """Keep the libraries' own bars for loading off the screen; ours say what takes time."""
    import datasets
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
