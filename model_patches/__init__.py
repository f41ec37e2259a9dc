"""What is hung on a host model, and how it attaches."""
