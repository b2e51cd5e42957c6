"""How work that takes long is stopped from outside."""


class Cancelled(BaseException):
    """Raised by a `progress` callback to end the work between two images.

    No Exception, so that nothing takes it for the failure of an image, which would be noted and passed over.
    """
