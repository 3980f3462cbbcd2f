"""Text in, token batches out: sources → tokenizer → corpus (cached on disk) → packed rows → loader."""
