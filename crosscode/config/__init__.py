"""What a user can set: the experiment, the data, and the registries of components. Imports no torch."""
