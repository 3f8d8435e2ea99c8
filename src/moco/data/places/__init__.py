"""Where the bytes of one image lie: in a file, a tar, an array or a Hugging Face set, here or elsewhere."""
