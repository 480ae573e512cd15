package com.example.checkout;

import com.pointbook.v1.Buyer;
import com.pointbook.v1.CustomerRef;
import com.pointbook.v1.GetRedemptionRequest;
import com.pointbook.v1.IssueValidationCodeRequest;
import com.pointbook.v1.IssuedCode;
import com.pointbook.v1.ListRedemptionsRequest;
import com.pointbook.v1.RedeemPointsRequest;
import com.pointbook.v1.Redemption;
import com.pointbook.v1.ReverseRedemptionRequest;
import com.pointbook.v1.ValidateRedemptionRequest;
import com.pointbook.v1.ValidateRedemptionResponse;
import java.io.BufferedReader;
import java.io.IOException;
import java.io.PrintStream;
import java.util.Optional;
import java.util.UUID;

/** A till that redeems points for an order and gives them back. */
final class Till {
    private final PointbookClient client;
    private final Options options;
    private final CustomerRef customer;
    private final BufferedReader in;
    private final PrintStream out;

    Till(PointbookClient client, Options options, BufferedReader in, PrintStream out) {
        this.client = client;
        this.options = options;
        this.in = in;
        this.out = out;
        customer = CustomerRef.newBuilder()
                .setMerchantId(options.merchantId())
                .setBuyer(Buyer.newBuilder().setStoreId(options.storeId()).setBuyerId(options.buyerId()))
                .build();
    }

    /** Redeems, reverses and lists. Returns false if the points may not be redeemed. */
    boolean checkOut() throws IOException {
        Optional<Redemption> redemption = options.order().isEmpty() ? Optional.empty() : find(options.order());
        if (redemption.isEmpty()) {
            if (!validate()) {
                return false;
            }
            redemption = Optional.of(redeemWithCode());
        }
        Redemption redeemed = redemption.get();
        out.printf("redeemed %d points as %s: %s%n",
                redeemed.getPoints(), redeemed.getRedemptionId(), stateName(redeemed));
        Redemption reversed = reverse(redeemed.getExternalReferenceNumber());
        out.printf("reversed %d points: %s%n", reversed.getReversedPoints(), stateName(reversed));
        list();
        return true;
    }

    private Optional<Redemption> find(String order) {
        return client.find(GetRedemptionRequest.newBuilder()
                .setMerchantId(options.merchantId())
                .setExternalReferenceNumber(order)
                .build());
    }

    private boolean validate() {
        ValidateRedemptionResponse response = client.validate(ValidateRedemptionRequest.newBuilder()
                .setCustomer(customer)
                .setProgramId(options.programId())
                .setPoints(options.points())
                .build());
        if (!response.getRedeemable()) {
            response.getViolationsList()
                    .forEach(each -> out.printf("%d %s: %s%n", each.getCode(), each.getReason(), each.getMessage()));
            return false;
        }
        out.printf("%d of %d points may be redeemed, worth %s%n",
                options.points(), response.getActivePoints(), response.getRedeemLocalValue());
        return true;
    }

    private Redemption redeemWithCode() throws IOException {
        IssuedCode issued = client.issueCode(IssueValidationCodeRequest.newBuilder()
                .setCustomer(customer)
                .setProgramId(options.programId())
                .setPoints(options.points())
                .build());
        out.printf("code %s, challenge %s%n",
                issued.getSent() ? "sent" : "was sent before", issued.getChallengeId());
        String code = readCode();
        // A till stores the order before it sends it, so that it can repeat the call even after a crash of its own.
        String order = options.order().isEmpty() ? "order-" + UUID.randomUUID() : options.order();
        out.printf("redeeming as %s; after a crash, go on with --order %s%n", order, order);
        RedeemPointsRequest request = RedeemPointsRequest.newBuilder()
                .setCustomer(customer)
                .setProgramId(options.programId())
                .setPoints(options.points())
                .setChallengeId(issued.getChallengeId())
                .setValidationCode(code)
                .setExternalReferenceNumber(order)
                .build();
        return client.redeem(request, each -> out.printf("no answer, repeating %s: %s%n", order, each.getMessage()));
    }

    private String readCode() throws IOException {
        out.print("code that the customer says: ");
        out.flush();
        String code = in.readLine();
        if (code == null) {
            throw new IOException("no code was entered");
        }
        return code;
    }

    /** The reversal's own reference follows from the order, so that it can be repeated too. */
    private Redemption reverse(String order) {
        return client.reverse(ReverseRedemptionRequest.newBuilder()
                .setMerchantId(options.merchantId())
                .setRedeemedReferenceNumber(order)
                .setExternalReferenceNumber("reverse-" + order)
                .build());
    }

    private void list() {
        ListRedemptionsRequest request = ListRedemptionsRequest.newBuilder()
                .setMerchantId(options.merchantId())
                .setCustomer(customer)
                .setPageSize(options.pageSize())
                .build();
        client.forEachRedemption(
                request,
                each -> out.printf("%s %d points %s %s%n",
                        each.getRedemptionId(),
                        each.getPoints(),
                        stateName(each),
                        each.getExternalReferenceNumber()));
    }

    private static String stateName(Redemption redemption) {
        return redemption.getState().name().replaceFirst("^REDEMPTION_STATE_", "");
    }
}
