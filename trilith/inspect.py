"""What gradients do on their way through a model."""

from trilith.blocks.inspect import GradientFlow, Layer, gradcheck, gradient_flow, jacobian

__all__ = ["GradientFlow", "Layer", "gradcheck", "gradient_flow", "jacobian"]
