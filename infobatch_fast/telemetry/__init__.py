"""Where an epoch's time goes, which host syncs it has, and what the card says."""
