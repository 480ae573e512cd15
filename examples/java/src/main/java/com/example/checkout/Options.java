package com.example.checkout;

import java.time.Duration;
import java.util.HashMap;
import java.util.Map;
import java.util.function.Function;

/** The options of the command line. */
record Options(
        ConnectionSettings connection,
        String merchantId,
        String storeId,
        String buyerId,
        long programId,
        long points,
        String order,
        int pageSize,
        Duration timeout) {

    static final String USAGE =
            """
            usage: java -jar target/checkout.jar [OPTION VALUE]...

              --merchant   the merchant's id [2000001234]
              --store      the store's id [1718263946864]
              --buyer      the customer's id in the store [2404721679]
              --program    the program's id [1]
              --points     the points to redeem [10]
              --order      the order of an earlier run, to go on after a crash [a new one]
              --page-size  redemptions on a page of the list, 0 for the server's default [0]
              --timeout    seconds for each call with its retries [10]

            These variables say how to reach the server, as for the pointbook commands: POINTBOOK_GRPC_ADDRESS
            (127.0.0.1:50051), POINTBOOK_TOKEN, POINTBOOK_SERVER_CA_FILE for TLS, POINTBOOK_CLIENT_CERT_FILE and
            POINTBOOK_CLIENT_KEY_FILE.\
            """;

    /** Throws IllegalArgumentException for a wrong option. */
    static Options parse(String[] arguments, Map<String, String> environment) {
        Map<String, String> values = new HashMap<>(Map.of(
                "--merchant", "2000001234",
                "--store", "1718263946864",
                "--buyer", "2404721679",
                "--program", "1",
                "--points", "10",
                "--order", "",
                "--page-size", "0",
                "--timeout", "10"));
        for (int i = 0; i < arguments.length; i += 2) {
            if (!values.containsKey(arguments[i])) {
                throw new IllegalArgumentException(arguments[i] + " is not an option");
            }
            if (i + 1 == arguments.length) {
                throw new IllegalArgumentException(arguments[i] + " needs a value");
            }
            values.put(arguments[i], arguments[i + 1]);
        }
        return new Options(
                ConnectionSettings.fromEnvironment(environment),
                values.get("--merchant"),
                values.get("--store"),
                values.get("--buyer"),
                number("--program", values, Long::parseLong),
                number("--points", values, Long::parseLong),
                values.get("--order"),
                number("--page-size", values, Integer::parseInt),
                Duration.ofSeconds(number("--timeout", values, Long::parseLong)));
    }

    private static <T> T number(String name, Map<String, String> values, Function<String, T> parser) {
        try {
            return parser.apply(values.get(name));
        } catch (NumberFormatException exception) {
            throw new IllegalArgumentException(
                    name + " needs a whole number, not " + values.get(name), exception);
        }
    }
}
