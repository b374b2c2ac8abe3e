"""One adapter per dialect. Vendor protocols and their errors end here."""
