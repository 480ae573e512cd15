package com.example.checkout;

import com.google.gson.Gson;
import com.google.gson.reflect.TypeToken;
import com.pointbook.v1.GetRedemptionRequest;
import com.pointbook.v1.IssueValidationCodeRequest;
import com.pointbook.v1.IssuedCode;
import com.pointbook.v1.ListRedemptionsRequest;
import com.pointbook.v1.ListRedemptionsResponse;
import com.pointbook.v1.RedeemPointsRequest;
import com.pointbook.v1.Redemption;
import com.pointbook.v1.RedemptionServiceGrpc;
import com.pointbook.v1.RedemptionServiceGrpc.RedemptionServiceBlockingStub;
import com.pointbook.v1.ReverseRedemptionRequest;
import com.pointbook.v1.ValidateRedemptionRequest;
import com.pointbook.v1.ValidateRedemptionResponse;
import io.grpc.Grpc;
import io.grpc.ManagedChannel;
import io.grpc.StatusRuntimeException;
import java.io.IOException;
import java.io.InputStream;
import java.io.InputStreamReader;
import java.io.Reader;
import java.nio.charset.StandardCharsets;
import java.time.Duration;
import java.util.Map;
import java.util.Objects;
import java.util.Optional;
import java.util.concurrent.TimeUnit;
import java.util.function.Consumer;
import java.util.function.Function;

/**
 * The redemption calls of a Pointbook server, each with a deadline, retries, and typed errors.
 *
 * <p>Open one for each process and share it: it is thread-safe and connects at its first call.
 */
public final class PointbookClient implements AutoCloseable {
    private static final int REDEEM_ATTEMPTS = 3;
    private static final Duration REDEEM_PAUSE = Duration.ofSeconds(1);
    // The server closes connections that send pings more often than every 10 s.
    private static final Duration KEEPALIVE = Duration.ofSeconds(20);
    private static final Duration KEEPALIVE_TIMEOUT = Duration.ofSeconds(5);

    private final ManagedChannel channel;
    private final RedemptionServiceBlockingStub stub;
    private final Duration timeout;

    /** Opens a client whose calls end within a time, including their retries. */
    public PointbookClient(ConnectionSettings settings, Duration timeout) throws IOException {
        this.timeout = timeout;
        channel = Grpc.newChannelBuilder("dns:///" + settings.address(), settings.credentials())
                .defaultServiceConfig(serviceConfig())
                .enableRetry()
                .keepAliveTime(KEEPALIVE.toSeconds(), TimeUnit.SECONDS)
                .keepAliveTimeout(KEEPALIVE_TIMEOUT.toSeconds(), TimeUnit.SECONDS)
                .build();
        // A call waits until its deadline for a server that restarts.
        stub = RedemptionServiceGrpc.newBlockingStub(channel).withWaitForReady();
    }

    /** Returns the retry policy for all clients, which the build copies from deploy/client. */
    private static Map<String, ?> serviceConfig() throws IOException {
        InputStream resource = PointbookClient.class.getResourceAsStream("/service-config.json");
        try (Reader reader = new InputStreamReader(Objects.requireNonNull(resource), StandardCharsets.UTF_8)) {
            return new Gson().fromJson(reader, new TypeToken<Map<String, ?>>() {});
        }
    }

    /** Returns whether points may be redeemed. "No" is an answer with all violations, not an error. */
    public ValidateRedemptionResponse validate(ValidateRedemptionRequest request) {
        return call(each -> each.validateRedemption(request));
    }

    /** Sends the customer a code for exactly this program and amount. */
    public IssuedCode issueCode(IssueValidationCodeRequest request) {
        return call(each -> each.issueValidationCode(request)).getIssuedCode();
    }

    /**
     * Redeems points once, however often the request is sent, because its reference stays the same.
     *
     * <p>Repeats the call while its outcome is unknown: its answer was lost, or the server is away.
     *
     * @param onRepeat gets the error of each call that is repeated
     */
    public Redemption redeem(RedeemPointsRequest request, Consumer<PointbookException> onRepeat) {
        for (int attempt = 1; ; attempt++) {
            try {
                return call(each -> each.redeemPoints(request)).getRedemption();
            } catch (PointbookException exception) {
                if (!exception.error().isOutcomeUnknown() || attempt == REDEEM_ATTEMPTS) {
                    throw exception;
                }
                onRepeat.accept(exception);
                pauseAfter(exception);
            }
        }
    }

    /** Returns the redemption with a reference, if there is one. */
    public Optional<Redemption> find(GetRedemptionRequest request) {
        try {
            return Optional.of(call(each -> each.getRedemption(request)).getRedemption());
        } catch (PointbookException exception) {
            if (exception.error().reason().equals("REDEMPTION_NOT_FOUND")) {
                return Optional.empty();
            }
            throw exception;
        }
    }

    /** Gives points back, once for each reference of a reversal. */
    public Redemption reverse(ReverseRedemptionRequest request) {
        return call(each -> each.reverseRedemption(request)).getRedemption();
    }

    /** Passes on all redemptions of a request's filters, newest first, page by page. */
    public void forEachRedemption(ListRedemptionsRequest filters, Consumer<Redemption> consumer) {
        ListRedemptionsRequest.Builder request = filters.toBuilder();
        do {
            ListRedemptionsResponse page = call(each -> each.listRedemptions(request.build()));
            page.getRedemptionsList().forEach(consumer);
            request.setPageToken(page.getNextPageToken());
        } while (!request.getPageToken().isEmpty());
    }

    private <T> T call(Function<RedemptionServiceBlockingStub, T> method) {
        try {
            return method.apply(stub.withDeadlineAfter(timeout));
        } catch (StatusRuntimeException exception) {
            throw new PointbookException(exception);
        }
    }

    private void pauseAfter(PointbookException exception) {
        Duration delay = exception.error().retryDelay();
        try {
            Thread.sleep((delay.compareTo(REDEEM_PAUSE) > 0 ? delay : REDEEM_PAUSE).toMillis());
        } catch (InterruptedException interruption) {
            Thread.currentThread().interrupt();
            throw exception;
        }
        // Connect now, rather than after the channel's own pause, which grows to two minutes.
        channel.resetConnectBackoff();
    }

    @Override
    public void close() {
        channel.shutdownNow();
    }
}
