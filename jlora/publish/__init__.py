"""Taking what was trained to where others find it: the model card and the Hugging Face hub."""
