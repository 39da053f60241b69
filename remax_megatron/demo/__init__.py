"""What `make demo` trains on, made on the spot and offline: word problems, a tokenizer, a small warm-started policy."""
