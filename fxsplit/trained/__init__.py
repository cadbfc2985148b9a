"""A trained model in use: loaded with its classes and preprocessing, evaluated, asked about images, exported."""
