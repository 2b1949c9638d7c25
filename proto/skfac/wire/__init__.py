"""What both ends of the wire share besides messages: values, frames and errors."""
