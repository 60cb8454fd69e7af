"""An HTTP server that speaks TensorFlow Serving's REST format."""
