package com.example.checkout;

import io.grpc.StatusRuntimeException;

/** Thrown by the calls of {@link PointbookClient}: {@link #error()} has the reason and the other details. */
public final class PointbookException extends RuntimeException {
    private static final long serialVersionUID = 1L;

    private final transient CallError error;

    PointbookException(StatusRuntimeException cause) {
        this(CallError.of(cause), cause);
    }

    private PointbookException(CallError error, StatusRuntimeException cause) {
        super(error.toString(), cause);
        this.error = error;
    }

    public CallError error() {
        return error;
    }
}
