package pointbook

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Error is the error of a call, with its details. Every call over a connection of Dial that fails returns one:
//
//	var failed *pointbook.Error
//	if errors.As(err, &failed) && failed.Reason == "INSUFFICIENT_POINTS" { … }
type Error struct {
	Code       codes.Code
	Reason     string            // an ErrorReason without its prefix; empty if the server did not answer
	Message    string            // for developers: do not parse it
	Metadata   map[string]string // the values that the reason refers to
	Violations []Violation       // the wrong fields of the request
	RetryDelay time.Duration     // the delay before a retry can help; 0 if there is none
	RequestID  string            // what the server's log calls this call

	status *status.Status
}

// Violation is a wrong field of a request.
type Violation struct {
	Field       string // a path such as customer.buyer.buyer_id
	Description string
}

// Error returns everything that a log needs, a line for each wrong field.
func (e *Error) Error() string {
	text := new(strings.Builder)
	fmt.Fprintf(text, "%s: %s", cmp.Or(e.Reason, e.Code.String()), e.Message)
	for _, name := range slices.Sorted(maps.Keys(e.Metadata)) {
		fmt.Fprintf(text, " %s=%s", name, e.Metadata[name])
	}
	if e.RetryDelay > 0 {
		fmt.Fprintf(text, " (retry after %v)", e.RetryDelay)
	}
	if e.RequestID != "" {
		fmt.Fprintf(text, " (request %s)", e.RequestID)
	}
	for _, violation := range e.Violations {
		fmt.Fprintf(text, "\n  %s: %s", violation.Field, violation.Description)
	}
	return text.String()
}

// GRPCStatus returns the status, so that status.Code and status.FromError read this error too.
func (e *Error) GRPCStatus() *status.Status { return e.status }

// IsOutcomeUnknown reports whether the server may have done what the call asked for, although its answer was lost:
// repeat the call with the same reference.
func (e *Error) IsOutcomeUnknown() bool {
	return e.Code == codes.Unavailable || e.Code == codes.DeadlineExceeded
}

// decodeErrors returns the error of a call as an Error.
func decodeErrors(
	ctx context.Context, method string, request, response any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker,
	options ...grpc.CallOption,
) error {
	var trailer metadata.MD
	err := invoke(ctx, method, request, response, conn, append(options, grpc.Trailer(&trailer))...)
	if err == nil {
		return nil
	}
	failed := newError(status.Convert(err))
	if ids := trailer.Get("x-request-id"); len(ids) > 0 {
		failed.RequestID = ids[0]
	}
	return failed
}

func newError(answer *status.Status) *Error {
	failed := &Error{Code: answer.Code(), Message: answer.Message(), status: answer}
	for _, detail := range answer.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			failed.Reason, failed.Metadata = detail.GetReason(), detail.GetMetadata()
		case *errdetails.BadRequest:
			for _, violation := range detail.GetFieldViolations() {
				failed.Violations = append(failed.Violations, Violation{violation.GetField(), violation.GetDescription()})
			}
		case *errdetails.RetryInfo:
			failed.RetryDelay = detail.GetRetryDelay().AsDuration()
		}
	}
	return failed
}
