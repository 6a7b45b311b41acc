"""A paper's claims, tried here: arms of a comparison, what their models lose on held-out documents, and a verdict."""
