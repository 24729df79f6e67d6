"""What happens again and again: pipelines, and the watch that starts them."""
