"""Text to tokens: templates, rendering, windows, episodes, batches, requested returns, few-shot demonstrations."""
