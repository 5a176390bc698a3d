"""`python -m vit_ref.cli` is the command `vit-ref`."""

from vit_ref.cli.entry import main

main()
