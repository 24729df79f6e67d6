"""The one training loop, and what it stands on. Only driver.py knows Ray."""
