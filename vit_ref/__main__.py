"""`python -m vit_ref` is the command `vit-ref`."""

from vit_ref.cli.entry import main

main()
