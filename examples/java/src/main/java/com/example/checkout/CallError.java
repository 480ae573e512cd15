package com.example.checkout;

import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.protobuf.Message;
import com.google.rpc.BadRequest;
import com.google.rpc.ErrorInfo;
import com.google.rpc.RetryInfo;
import io.grpc.Metadata;
import io.grpc.Status.Code;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import java.io.UncheckedIOException;
import java.math.BigDecimal;
import java.time.Duration;
import java.util.List;
import java.util.Map;
import java.util.Optional;
import java.util.TreeMap;

/**
 * The error of a call, with its details.
 *
 * @param code            the gRPC code
 * @param reason          an ErrorReason without its prefix; empty if the server did not answer
 * @param message         for developers: do not parse it
 * @param metadata        the values that the reason refers to
 * @param fieldViolations the wrong fields of the request
 * @param retryDelay      the delay before a retry can help; zero if there is none
 * @param requestId       what the server's log calls this call; empty if the server did not answer
 */
public record CallError(
        Code code,
        String reason,
        String message,
        Map<String, String> metadata,
        List<FieldViolation> fieldViolations,
        Duration retryDelay,
        String requestId) {

    private static final Metadata.Key<String> REQUEST_ID =
            Metadata.Key.of("x-request-id", Metadata.ASCII_STRING_MARSHALLER);

    /**
     * A wrong field of a request.
     *
     * @param field       a path such as customer.buyer.buyer_id
     * @param description what is wrong with it
     */
    public record FieldViolation(String field, String description) {}

    static CallError of(StatusRuntimeException exception) {
        com.google.rpc.Status status = StatusProto.fromThrowable(exception);
        ErrorInfo info = detail(status, ErrorInfo.class).orElse(ErrorInfo.getDefaultInstance());
        BadRequest badRequest = detail(status, BadRequest.class).orElse(BadRequest.getDefaultInstance());
        RetryInfo retry = detail(status, RetryInfo.class).orElse(RetryInfo.getDefaultInstance());
        return new CallError(
                exception.getStatus().getCode(),
                info.getReason(),
                status.getMessage(),
                info.getMetadataMap(),
                badRequest.getFieldViolationsList().stream()
                        .map(each -> new FieldViolation(each.getField(), each.getDescription()))
                        .toList(),
                Duration.ofSeconds(retry.getRetryDelay().getSeconds(), retry.getRetryDelay().getNanos()),
                Optional.ofNullable(exception.getTrailers()).map(each -> each.get(REQUEST_ID)).orElse(""));
    }

    private static <T extends Message> Optional<T> detail(com.google.rpc.Status status, Class<T> type) {
        Optional<Any> packed = status.getDetailsList().stream().filter(each -> each.is(type)).findFirst();
        try {
            return packed.isEmpty() ? Optional.empty() : Optional.of(packed.get().unpack(type));
        } catch (InvalidProtocolBufferException exception) {
            throw new UncheckedIOException(exception);
        }
    }

    /**
     * Whether the server may have done what the call asked for, although its answer was lost: repeat the call with the
     * same reference.
     */
    public boolean isOutcomeUnknown() {
        return code == Code.UNAVAILABLE || code == Code.DEADLINE_EXCEEDED;
    }

    /** Returns everything that a log needs, with a line for each wrong field. */
    @Override
    public String toString() {
        StringBuilder text = new StringBuilder(reason.isEmpty() ? code.name() : reason).append(": ").append(message);
        new TreeMap<>(metadata).forEach((name, value) -> text.append(' ').append(name).append('=').append(value));
        if (!retryDelay.isZero()) {
            text.append(" (retry after ").append(seconds(retryDelay)).append(')');
        }
        if (!requestId.isEmpty()) {
            text.append(" (request ").append(requestId).append(')');
        }
        for (FieldViolation each : fieldViolations) {
            text.append(System.lineSeparator()).append("  ").append(each.field).append(": ").append(each.description);
        }
        return text.toString();
    }

    private static String seconds(Duration delay) {
        return BigDecimal.valueOf(delay.toMillis(), 3).stripTrailingZeros().toPlainString() + "s";
    }
}
