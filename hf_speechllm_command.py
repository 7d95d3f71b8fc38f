"""The door to the command line, `hf-speechllm` and the recipes.

It lies outside the package, which loads torch and transformers when it is imported, so as to register its classes. The
package sees that this module came first, and waits until a class is used: `--help` and errors take no seconds.
"""


def main(verb: str | None = None) -> None:
    """Runs a verb; default the first word of the command line."""
    from hf_speechllm.cli.main import main

    main(verb)
