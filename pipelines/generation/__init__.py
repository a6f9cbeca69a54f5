"""From files to a generated file: requests, settings, the generator, results."""
