"""What algorithms, data sets and nets there are; light to import."""
