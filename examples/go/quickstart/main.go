// Command quickstart redeems points of a customer and reverses them, also if the server is killed in between.
package main

import (
	"context"
	"fmt"
	"os"

	"example.com/pointbook"
	pb "example.com/pointbook/gen/pointbook/v1"
)

func main() {
	ctx, buyer, order := context.Background(), os.Args[1], "order-"+os.Args[1]
	client := pb.NewRedemptionServiceClient(pointbook.Must(pointbook.Dial(pointbook.FromEnvironment())))
	redeemed := pointbook.Must(client.RedeemPoints(ctx, &pb.RedeemPointsRequest{
		Customer: pointbook.BuyerRef("2000001234", "1718263946864", buyer), ProgramId: 1, Points: 10,
		ExternalReferenceNumber: order})).Redemption // The same reference never redeems twice.
	fmt.Println(redeemed.Points, "points redeemed: kill the server, start it again, and press Enter")
	fmt.Scanln()
	reversed := pointbook.Must(client.ReverseRedemption(ctx, &pb.ReverseRedemptionRequest{
		MerchantId: redeemed.MerchantId, ExternalReferenceNumber: "reverse-" + order,
		Redemption: &pb.ReverseRedemptionRequest_RedemptionId{RedemptionId: redeemed.RedemptionId}}))
	fmt.Println(reversed.Redemption.ReversedPoints, "points reversed")
}
