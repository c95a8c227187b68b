"""The head engine: fits many heads together on cached feature maps (`engine` says how)."""
