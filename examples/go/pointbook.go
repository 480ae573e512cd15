// Package pointbook connects to a Pointbook server: retries, keepalive, deadlines, access, and errors with their details.
package pointbook

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	_ "embed"
	"fmt"
	"log"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/keepalive"

	pb "example.com/pointbook/gen/pointbook/v1"
)

//go:generate ../../.venv/bin/buf generate
//go:generate cp ../../deploy/client/service-config.json gen

// serviceConfig retries what can succeed, waits for a server that restarts, and gives each call a deadline.
//
//go:embed gen/service-config.json
var serviceConfig string

// The server closes connections that send pings more often than every 10 s.
var keepaliveParameters = keepalive.ClientParameters{Time: 20 * time.Second, Timeout: 5 * time.Second}

// Config says how to reach a server. The zero value of each field but Address means that it is not used.
type Config struct {
	Address  string // host:port
	Token    string // needs CAFile: a token is never sent in plain text
	CAFile   string // certificates that sign the server's; empty for plain text
	CertFile string // this client's certificate, for a token that is bound to it
	KeyFile  string
}

// FromEnvironment returns the settings that the pointbook commands use too. Its defaults reach `pointbook dev`.
func FromEnvironment() Config {
	config := Config{
		Address:  os.Getenv("POINTBOOK_GRPC_ADDRESS"),
		Token:    os.Getenv("POINTBOOK_TOKEN"),
		CAFile:   os.Getenv("POINTBOOK_SERVER_CA_FILE"),
		CertFile: os.Getenv("POINTBOOK_CLIENT_CERT_FILE"),
		KeyFile:  os.Getenv("POINTBOOK_CLIENT_KEY_FILE"),
	}
	if config.Address == "" {
		config.Address = "127.0.0.1:50051"
	}
	return config
}

// Dial returns a connection, which connects at its first call. Open one for each process and share it.
func Dial(config Config) (*grpc.ClientConn, error) {
	transport, err := config.transport()
	if err != nil {
		return nil, err
	}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(transport),
		grpc.WithDefaultServiceConfig(serviceConfig),
		grpc.WithKeepaliveParams(keepaliveParameters),
		grpc.WithUnaryInterceptor(decodeErrors),
	}
	if config.Token != "" {
		options = append(options, grpc.WithPerRPCCredentials(bearer(config.Token)))
	}
	return grpc.NewClient("dns:///"+config.Address, options...)
}

// BuyerRef names a customer by SHOPLINE's id in a store.
func BuyerRef(merchantID, storeID, buyerID string) *pb.CustomerRef {
	buyer := &pb.Buyer{StoreId: storeID, BuyerId: buyerID}
	return &pb.CustomerRef{MerchantId: merchantID, Identifier: &pb.CustomerRef_Buyer{Buyer: buyer}}
}

// Must returns the value of a call, or ends a program that cannot go on without it.
func Must[T any](value T, err error) T {
	if err != nil {
		log.Fatal(err)
	}
	return value
}

func (config Config) transport() (credentials.TransportCredentials, error) {
	if config.CAFile == "" {
		return insecure.NewCredentials(), nil
	}
	authorities, err := os.ReadFile(config.CAFile)
	if err != nil {
		return nil, err
	}
	settings := &tls.Config{RootCAs: x509.NewCertPool(), MinVersion: tls.VersionTLS12}
	if !settings.RootCAs.AppendCertsFromPEM(authorities) {
		return nil, fmt.Errorf("%s has no certificate", config.CAFile)
	}
	if config.CertFile != "" {
		certificate, err := tls.LoadX509KeyPair(config.CertFile, config.KeyFile)
		if err != nil {
			return nil, err
		}
		settings.Certificates = []tls.Certificate{certificate}
	}
	return credentials.NewTLS(settings), nil
}

// bearer is a token that gRPC sends with each call, over TLS only.
type bearer string

func (token bearer) GetRequestMetadata(context.Context, ...string) (map[string]string, error) {
	return map[string]string{"authorization": "Bearer " + string(token)}, nil
}

func (bearer) RequireTransportSecurity() bool { return true }
