package com.example.checkout;

import io.grpc.ManagedChannelRegistry.ProviderNotFoundException;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.nio.charset.Charset;
import java.util.List;
import java.util.logging.Level;
import java.util.logging.Logger;

/** A checkout at a till: validation, one-time code, redemption, reversal, and the customer's redemptions. */
public final class Main {
    private static final int FAILED = 1;
    private static final int USAGE = 2;
    private static final Logger GRPC_LOG = Logger.getLogger("io.grpc");

    private Main() {}

    public static void main(String[] arguments) {
        GRPC_LOG.setLevel(Level.WARNING);
        System.exit(run(arguments));
    }

    private static int run(String[] arguments) {
        if (List.of(arguments).contains("--help")) {
            System.out.println(Options.USAGE);
            return 0;
        }
        Options options;
        try {
            options = Options.parse(arguments, System.getenv());
        } catch (IllegalArgumentException exception) {
            System.err.println(exception.getMessage());
            return USAGE;
        }
        BufferedReader in = new BufferedReader(new InputStreamReader(System.in, Charset.defaultCharset()));
        try (PointbookClient client = new PointbookClient(options.connection(), options.timeout())) {
            if (new Till(client, options, in, System.out).checkOut()) {
                return 0;
            }
            System.err.println("the points cannot be redeemed");
            return FAILED;
        } catch (PointbookException | IOException | ProviderNotFoundException exception) {
            System.err.println(exception.getMessage());
            return FAILED;
        }
    }
}
