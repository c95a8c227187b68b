"""Feature stores, and the backbones that fill them."""
