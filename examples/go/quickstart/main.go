// --8<-- [start:go]

// Command quickstart redeems points of a customer and reverses them, also if the server is killed in between.
package main

import (
	"context"
	"fmt"
	"log"
	"os"

	"example.com/pointbook"
	pb "example.com/pointbook/gen/pointbook/v1"
)

func main() {
	connection, err := pointbook.Dial(pointbook.FromEnvironment())
	if err != nil {
		log.Fatal(err)
	}
	client, order := pb.NewRedemptionServiceClient(connection), "order-"+os.Args[1]
	buyer := &pb.CustomerRef_Buyer{Buyer: &pb.Buyer{StoreId: "1718263946864", BuyerId: os.Args[1]}}
	redeemed, err := client.RedeemPoints(context.Background(), &pb.RedeemPointsRequest{
		Customer:  &pb.CustomerRef{MerchantId: "2000001234", Identifier: buyer},
		ProgramId: 1, Points: 10, ExternalReferenceNumber: order,
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(redeemed.Redemption.Points, "points redeemed: kill the server, start it again, and press Enter")
	fmt.Scanln()
	reversed, err := client.ReverseRedemption(context.Background(), &pb.ReverseRedemptionRequest{
		MerchantId: "2000001234", ExternalReferenceNumber: "reverse-" + order,
		Redemption: &pb.ReverseRedemptionRequest_RedeemedReferenceNumber{RedeemedReferenceNumber: order},
	})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(reversed.Redemption.ReversedPoints, "points reversed")
}

// --8<-- [end:go]
