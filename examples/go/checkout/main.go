// Command checkout redeems points at a till: validation, one-time code, redemption, reversal, and the customer's list.
package main

import (
	"bufio"
	"context"
	"crypto/rand"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"example.com/pointbook"
	pb "example.com/pointbook/gen/pointbook/v1"
)

// redeemAttempts is how often a redemption is sent, each time with the same reference, until its outcome is known.
const redeemAttempts = 3

var errNotRedeemable = errors.New("the points cannot be redeemed")

func main() {
	if err := run(context.Background(), os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, arguments []string, in io.Reader, out io.Writer) error {
	config := pointbook.FromEnvironment()
	till := till{in: bufio.NewReader(in), out: out}
	buyer, order := new(pb.Buyer), ""
	flags := flag.NewFlagSet("checkout", flag.ExitOnError)
	flags.StringVar(&config.Address, "address", config.Address, "the server's host:port; POINTBOOK_GRPC_ADDRESS")
	flags.StringVar(&config.CAFile, "ca", config.CAFile, "CA certificates, for TLS; POINTBOOK_SERVER_CA_FILE")
	flags.StringVar(&till.merchant, "merchant", "2000001234", "the merchant's id")
	flags.StringVar(&buyer.StoreId, "store", "1718263946864", "the store's id")
	flags.StringVar(&buyer.BuyerId, "buyer", "2404721679", "the customer's id in the store")
	flags.Int64Var(&till.program, "program", 1, "the program's id")
	flags.Int64Var(&till.points, "points", 10, "the points to redeem")
	flags.StringVar(&order, "order", "", "the order of an earlier run, to go on after a crash; by default a new one")
	flags.IntVar(&till.pageSize, "page-size", 0, "redemptions on a page of the list; 0 for the server's default")
	flags.DurationVar(&till.timeout, "timeout", 10*time.Second, "the deadline of each call, with its retries")
	_ = flags.Parse(arguments) // It exits on an error.

	connection, err := pointbook.Dial(config)
	if err != nil {
		return err
	}
	defer connection.Close()
	till.client = pb.NewRedemptionServiceClient(connection)
	till.customer = pointbook.BuyerRef(till.merchant, buyer.StoreId, buyer.BuyerId)
	return till.checkOut(ctx, order)
}

type till struct {
	client          pb.RedemptionServiceClient
	customer        *pb.CustomerRef
	merchant        string
	program, points int64
	pageSize        int
	timeout         time.Duration
	in              *bufio.Reader
	out             io.Writer
}

// checkOut redeems points for an order, a new one if it is empty, and gives them back.
func (t *till) checkOut(ctx context.Context, order string) error {
	redemption, err := t.find(ctx, order)
	if err != nil {
		return err
	}
	if redemption == nil {
		if redemption, err = t.redeemWithCode(ctx, order); err != nil {
			return err
		}
	}
	t.print("redeemed %d points as %s: %s", redemption.Points, redemption.RedemptionId, stateName(redemption))
	if redemption, err = t.reverse(ctx, redemption.ExternalReferenceNumber); err != nil {
		return err
	}
	t.print("reversed %d points: %s", redemption.ReversedPoints, stateName(redemption))
	return t.list(ctx)
}

// find returns the redemption of an order, or nil if there is none.
func (t *till) find(ctx context.Context, order string) (*pb.Redemption, error) {
	if order == "" {
		return nil, nil
	}
	ctx, cancel := context.WithTimeout(ctx, t.timeout)
	defer cancel()
	response, err := t.client.GetRedemption(ctx, &pb.GetRedemptionRequest{
		MerchantId: t.merchant,
		Redemption: &pb.GetRedemptionRequest_ExternalReferenceNumber{ExternalReferenceNumber: order},
	})
	var failed *pointbook.Error
	if errors.As(err, &failed) && failed.Reason == "REDEMPTION_NOT_FOUND" {
		return nil, nil
	}
	return response.GetRedemption(), err
}

func (t *till) redeemWithCode(ctx context.Context, order string) (*pb.Redemption, error) {
	if err := t.validate(ctx); err != nil {
		return nil, err
	}
	issued, err := t.issueCode(ctx)
	if err != nil {
		return nil, err
	}
	fmt.Fprint(t.out, "code that the customer says: ")
	code, err := t.in.ReadString('\n')
	if err != nil {
		return nil, fmt.Errorf("no code was entered: %w", err)
	}
	if order == "" {
		order = "order-" + rand.Text()
	}
	// A till stores the reference before it sends it, so that it can repeat the call even after a crash of its own.
	t.print("redeeming as %s; after a crash, go on with -order %s", order, order)
	return t.redeem(ctx, &pb.RedeemPointsRequest{
		Customer:                t.customer,
		ProgramId:               t.program,
		Points:                  t.points,
		ValidationCode:          strings.TrimSpace(code),
		ChallengeId:             issued.GetChallengeId(),
		ExternalReferenceNumber: order,
	})
}

// validate asks whether the points may be redeemed. A "no" is an answer, not an error of the call.
func (t *till) validate(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, t.timeout)
	defer cancel()
	response, err := t.client.ValidateRedemption(ctx, &pb.ValidateRedemptionRequest{
		Customer: t.customer, ProgramId: t.program, Points: t.points,
	})
	if err != nil {
		return err
	}
	if !response.Redeemable {
		for _, violation := range response.Violations {
			t.print("%d %s: %s", violation.Code, violation.Reason, violation.Message)
		}
		return errNotRedeemable
	}
	t.print("%d of %d points may be redeemed, worth %s", t.points, response.ActivePoints, response.RedeemLocalValue)
	return nil
}

// issueCode sends the customer a code for exactly this program and amount.
func (t *till) issueCode(ctx context.Context) (*pb.IssuedCode, error) {
	ctx, cancel := context.WithTimeout(ctx, t.timeout)
	defer cancel()
	response, err := t.client.IssueValidationCode(ctx, &pb.IssueValidationCodeRequest{
		Customer: t.customer, ProgramId: t.program, Points: t.points,
	})
	if err != nil {
		return nil, err
	}
	t.print("code sent, challenge %s", response.IssuedCode.ChallengeId)
	return response.IssuedCode, nil
}

// redeem redeems once, however often the request is sent, because its reference stays the same.
func (t *till) redeem(ctx context.Context, request *pb.RedeemPointsRequest) (*pb.Redemption, error) {
	for attempt := 1; ; attempt++ {
		redemption, err := t.redeemOnce(ctx, request)
		var failed *pointbook.Error
		if !errors.As(err, &failed) || !failed.IsOutcomeUnknown() || attempt == redeemAttempts {
			return redemption, err
		}
		t.print("no answer, repeating %s: %v", request.ExternalReferenceNumber, err)
	}
}

func (t *till) redeemOnce(ctx context.Context, request *pb.RedeemPointsRequest) (*pb.Redemption, error) {
	ctx, cancel := context.WithTimeout(ctx, t.timeout)
	defer cancel()
	response, err := t.client.RedeemPoints(ctx, request)
	return response.GetRedemption(), err
}

// reverse gives the points of an order back. Its reference follows from the order, so that it can be repeated too.
func (t *till) reverse(ctx context.Context, order string) (*pb.Redemption, error) {
	ctx, cancel := context.WithTimeout(ctx, t.timeout)
	defer cancel()
	response, err := t.client.ReverseRedemption(ctx, &pb.ReverseRedemptionRequest{
		MerchantId:              t.merchant,
		Redemption:              &pb.ReverseRedemptionRequest_RedeemedReferenceNumber{RedeemedReferenceNumber: order},
		ExternalReferenceNumber: "reverse-" + order,
	})
	return response.GetRedemption(), err
}

// list prints all redemptions of the customer, newest first.
func (t *till) list(ctx context.Context) error {
	request := &pb.ListRedemptionsRequest{
		MerchantId: t.merchant, Customer: t.customer, PageSize: int32(t.pageSize),
	}
	for {
		response, err := t.listPage(ctx, request)
		if err != nil {
			return err
		}
		for _, each := range response.Redemptions {
			t.print("%s %d points %s %s", each.RedemptionId, each.Points, stateName(each), each.ExternalReferenceNumber)
		}
		if request.PageToken = response.NextPageToken; request.PageToken == "" {
			return nil
		}
	}
}

func (t *till) listPage(
	ctx context.Context, request *pb.ListRedemptionsRequest,
) (*pb.ListRedemptionsResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, t.timeout)
	defer cancel()
	return t.client.ListRedemptions(ctx, request)
}

func (t *till) print(format string, values ...any) { fmt.Fprintf(t.out, format+"\n", values...) }

func stateName(redemption *pb.Redemption) string {
	return strings.TrimPrefix(redemption.State.String(), "REDEMPTION_STATE_")
}
