package com.example.checkout;

import io.grpc.CallCredentials;
import io.grpc.ChannelCredentials;
import io.grpc.CompositeChannelCredentials;
import io.grpc.InsecureChannelCredentials;
import io.grpc.Metadata;
import io.grpc.TlsChannelCredentials;
import java.io.File;
import java.io.IOException;
import java.util.Map;
import java.util.concurrent.Executor;

/**
 * How to reach a server. All but the address may be empty.
 *
 * @param address  HOST:PORT
 * @param token    needs {@code caFile}: a token is never sent in plain text
 * @param caFile   the certificates that sign the server's; empty for plain text
 * @param certFile this client's certificate, for a token that is bound to it
 * @param keyFile  the private key of {@code certFile}
 */
public record ConnectionSettings(String address, String token, String caFile, String certFile, String keyFile) {
    private static final String DEFAULT_ADDRESS = "127.0.0.1:50051";

    public ConnectionSettings {
        if (caFile.isEmpty() && !(token.isEmpty() && certFile.isEmpty())) {
            throw new IllegalArgumentException("a token and a certificate need TLS: set POINTBOOK_SERVER_CA_FILE");
        }
        if (certFile.isEmpty() != keyFile.isEmpty()) {
            throw new IllegalArgumentException(
                    "set both POINTBOOK_CLIENT_CERT_FILE and POINTBOOK_CLIENT_KEY_FILE, or neither");
        }
    }

    /** Returns the settings that the pointbook commands use too. The defaults reach {@code pointbook dev}. */
    public static ConnectionSettings fromEnvironment(Map<String, String> environment) {
        return new ConnectionSettings(
                environment.getOrDefault("POINTBOOK_GRPC_ADDRESS", DEFAULT_ADDRESS),
                environment.getOrDefault("POINTBOOK_TOKEN", ""),
                environment.getOrDefault("POINTBOOK_SERVER_CA_FILE", ""),
                environment.getOrDefault("POINTBOOK_CLIENT_CERT_FILE", ""),
                environment.getOrDefault("POINTBOOK_CLIENT_KEY_FILE", ""));
    }

    ChannelCredentials credentials() throws IOException {
        if (caFile.isEmpty()) {
            return InsecureChannelCredentials.create();
        }
        TlsChannelCredentials.Builder tls = TlsChannelCredentials.newBuilder().trustManager(new File(caFile));
        if (!certFile.isEmpty()) {
            tls.keyManager(new File(certFile), new File(keyFile));
        }
        return token.isEmpty() ? tls.build() : CompositeChannelCredentials.create(tls.build(), new BearerToken(token));
    }

    private static final class BearerToken extends CallCredentials {
        private static final Metadata.Key<String> AUTHORIZATION =
                Metadata.Key.of("authorization", Metadata.ASCII_STRING_MARSHALLER);

        private final Metadata headers = new Metadata();

        BearerToken(String token) {
            headers.put(AUTHORIZATION, "Bearer " + token);
        }

        @Override
        public void applyRequestMetadata(RequestInfo call, Executor executor, MetadataApplier applier) {
            applier.apply(headers);
        }
    }
}
