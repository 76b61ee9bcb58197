// Command headwater-go draws pictures with a Headwater sampler and shows on standard error how far it is.
//
// Exit codes: 0 drawn, 1 refused or failed, 2 wrong usage, 3 cancelled by --cancel-after-steps, 130 interrupted.
package main

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/code"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	samplerv1 "headwater/sampler/v1"
)

const (
	exitDrawn       = 0
	exitFailed      = 1
	exitUsage       = 2
	exitCancelled   = 3
	exitInterrupted = 130
)

const usage = "usage: headwater-go generate --address HOST:PORT|unix:/path --prompt TEXT -o FILE [options]\n"

// errEnough ends a call that --cancel-after-steps cancelled.
var errEnough = errors.New("cancelled after the asked number of steps")

func main() {
	os.Exit(run(os.Args[1:]))
}

func run(args []string) int {
	opts, err := parse(args)
	if errors.Is(err, flag.ErrHelp) {
		return exitDrawn
	}
	if err != nil {
		return exitUsage
	}
	interrupted, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	go func() {
		<-interrupted.Done()
		stop() // a second Ctrl-C ends the program at once
	}()

	err = generate(interrupted, opts)
	switch {
	case err == nil:
		return exitDrawn
	case interrupted.Err() != nil && status.Code(err) == codes.Canceled:
		complain("interrupted")
		return exitInterrupted
	case errors.Is(err, errEnough):
		complain(err.Error())
		return exitCancelled
	default:
		complain(describe(err))
		return exitFailed
	}
}

func complain(text string) {
	fmt.Fprintln(os.Stderr, "headwater-go:", text)
}

// generate draws what opts asks for. It writes files only once the whole call has succeeded.
func generate(ctx context.Context, opts *options) error {
	if _, err := os.Stat(filepath.Dir(opts.output)); err != nil {
		return err // before a slip of the pen costs a drawing
	}
	if opts.timeout > 0 {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, opts.timeout)
		defer cancel()
	}
	conn, err := grpc.Dial(opts.address, grpc.WithInsecure(), grpc.WithUserAgent("headwater-go"))
	if err != nil {
		return err
	}
	defer conn.Close()

	screen := newDisplay(os.Stderr)
	result, err := draw(ctx, samplerv1.NewSamplerServiceClient(conn), opts, screen)
	screen.clear()
	if err != nil {
		return err
	}
	if err := save(result.album.pictures, opts.output); err != nil {
		return err
	}
	fmt.Println(costLine(result.finished))
	return nil
}

// draw follows one call to its end and returns what came of it, checked.
func draw(
	ctx context.Context, client samplerv1.SamplerServiceClient, opts *options, screen *display,
) (*drawing, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := client.Generate(ctx, opts.request)
	if err != nil {
		return nil, err
	}
	result := &drawing{}
	enough := func() bool { return opts.cancelAfterSteps > 0 && result.steps >= opts.cancelAfterSteps }
	for {
		response, err := stream.Recv()
		switch {
		case errors.Is(err, io.EOF):
			return result, result.check()
		case status.Code(err) == codes.Canceled && enough():
			return nil, errEnough
		case err != nil:
			return nil, err
		}
		if line := newsLine(response, opts.pictureCount()); line != "" {
			screen.show(line)
		}
		if err := result.take(response); err != nil {
			return nil, err
		}
		if enough() {
			cancel() // and read on: the stream itself says how it ended
		}
	}
}

// A drawing is what a stream has brought so far.
type drawing struct {
	album    album
	steps    int
	finished *samplerv1.Finished
}

func (d *drawing) take(response *samplerv1.GenerateResponse) error {
	switch event := response.Event.(type) {
	case *samplerv1.GenerateResponse_Progress:
		if isStep(event.Progress) {
			d.steps++
		}
	case *samplerv1.GenerateResponse_ImageChunk:
		return d.album.add(event.ImageChunk)
	case *samplerv1.GenerateResponse_Finished:
		d.finished = event.Finished
	}
	return nil
}

// check refuses an OK stream that did not bring everything it promised.
func (d *drawing) check() error {
	if d.finished == nil {
		return errors.New("the stream ended without its last message")
	}
	if len(d.album.pictures) != len(d.finished.Seeds) || d.album.partial.Len() > 0 {
		return fmt.Errorf("%d whole pictures came, the sampler drew %d", len(d.album.pictures), len(d.finished.Seeds))
	}
	return nil
}

// isStep tells a finished step from the news that denoising begins.
func isStep(progress *samplerv1.Progress) bool {
	return progress.Phase == samplerv1.Phase_PHASE_DENOISING && progress.Step > 0
}

// A picture is one encoded file as the sampler sent it.
type picture struct {
	data    []byte
	summary *samplerv1.ImageSummary
}

// An album puts chunks together. Pictures arrive one after the other, so one buffer is enough.
type album struct {
	pictures []picture
	partial  bytes.Buffer
}

func (a *album) add(chunk *samplerv1.ImageChunk) error {
	if int(chunk.ImageIndex) != len(a.pictures) {
		return fmt.Errorf("a chunk of picture %d came while picture %d was open", chunk.ImageIndex, len(a.pictures))
	}
	a.partial.Write(chunk.Data)
	if chunk.Last == nil {
		return nil
	}
	data := append([]byte(nil), a.partial.Bytes()...)
	a.partial.Reset()
	if int64(len(data)) != chunk.Last.SizeBytes {
		return fmt.Errorf(
			"picture %d has %d bytes, the sampler announced %d", chunk.ImageIndex, len(data), chunk.Last.SizeBytes,
		)
	}
	if digest := sha256.Sum256(data); !bytes.Equal(digest[:], chunk.Last.Sha256) {
		return fmt.Errorf("picture %d was damaged on its way: its SHA-256 differs", chunk.ImageIndex)
	}
	a.pictures = append(a.pictures, picture{data: data, summary: chunk.Last})
	return nil
}

// A display rewrites one line of a terminal; anywhere else, each change is a line of its own.
type display struct {
	file *os.File
	live bool
}

const eraseLine = "\r\x1b[K"

func newDisplay(file *os.File) *display {
	info, err := file.Stat()
	return &display{file: file, live: err == nil && info.Mode()&os.ModeCharDevice != 0}
}

func (d *display) show(line string) {
	if d.live {
		fmt.Fprint(d.file, eraseLine, line)
	} else {
		fmt.Fprintln(d.file, line)
	}
}

func (d *display) clear() {
	if d.live {
		fmt.Fprint(d.file, eraseLine)
	}
}

// newsLine is what a message means to someone who waits; empty if nothing.
func newsLine(response *samplerv1.GenerateResponse, pictureCount int) string {
	switch event := response.Event.(type) {
	case *samplerv1.GenerateResponse_Queued:
		return queuedLine(event.Queued)
	case *samplerv1.GenerateResponse_Started:
		return fmt.Sprintf("started: %s on %s", event.Started.Model, event.Started.Replica)
	case *samplerv1.GenerateResponse_Progress:
		return progressLine(event.Progress, pictureCount)
	}
	return ""
}

func queuedLine(queued *samplerv1.Queued) string {
	line := fmt.Sprintf("queued: %d before this request", queued.Position)
	if queued.Estimate != nil {
		line += fmt.Sprintf(", about %.1f s", queued.Estimate.AsDuration().Seconds())
	}
	return line
}

func progressLine(progress *samplerv1.Progress, pictureCount int) string {
	phase := strings.ToLower(strings.TrimPrefix(progress.Phase.String(), "PHASE_"))
	line := fmt.Sprintf("picture %d/%d: %s", progress.ImageIndex+1, pictureCount, phase)
	switch progress.Phase {
	case samplerv1.Phase_PHASE_PREPARING:
		line += fmt.Sprintf(", %s of %s", mebibytes(progress.ReadyBytes), mebibytes(progress.TotalBytes))
	case samplerv1.Phase_PHASE_DENOISING:
		line += fmt.Sprintf(", step %d/%d", progress.Step, progress.StepCount)
	}
	return line
}

func costLine(finished *samplerv1.Finished) string {
	return fmt.Sprintf(
		"queued %.2f s, ran %.2f s, waited %.2f s for params, streamed %s",
		finished.QueueTime.AsDuration().Seconds(),
		finished.RunTime.AsDuration().Seconds(),
		finished.StallTime.AsDuration().Seconds(),
		mebibytes(finished.StreamedBytes),
	)
}

func mebibytes(count int64) string {
	return fmt.Sprintf("%.1f MiB", float64(count)/(1<<20))
}

// describe puts an error on one line; for a server's status: code, reason, what to mend and when to come back.
func describe(err error) string {
	failure, ok := status.FromError(err)
	if !ok {
		return oneLine(err.Error())
	}
	title := code.Code(failure.Code()).String()
	text := failure.Message()
	for _, detail := range failure.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			title += " " + detail.Reason
		case *errdetails.BadRequest:
			text = violations(detail)
		case *errdetails.RetryInfo:
			text += fmt.Sprintf(" (try again in %.1f s)", detail.RetryDelay.AsDuration().Seconds())
		}
	}
	return oneLine(title + ": " + text)
}

func violations(bad *errdetails.BadRequest) string {
	var items []string
	for _, violation := range bad.FieldViolations {
		items = append(items, violation.Field+": "+violation.Description)
	}
	return strings.Join(items, "; ")
}

func oneLine(text string) string {
	return strings.Join(strings.Fields(text), " ")
}

func save(pictures []picture, output string) error {
	for i, p := range pictures {
		path := outputPath(output, i, len(pictures))
		if err := writeAtomically(path, p.data); err != nil {
			return err
		}
		fmt.Printf("%s: %dx%d, seed %d\n", path, p.summary.WidthPx, p.summary.HeightPx, p.summary.Seed)
	}
	return nil
}

// outputPath numbers the files when there are several: out.png becomes out-0.png, out-1.png, ...
func outputPath(path string, index, count int) string {
	if count == 1 {
		return path
	}
	extension := filepath.Ext(path)
	return fmt.Sprintf("%s-%d%s", strings.TrimSuffix(path, extension), index, extension)
}

// writeAtomically leaves either the whole file or what was there before, also when the machine stops half-way.
func writeAtomically(path string, data []byte) error {
	file, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return err
	}
	defer os.Remove(file.Name()) // finds nothing once the file has its name
	if err := fill(file, data); err != nil {
		return err
	}
	return os.Rename(file.Name(), path)
}

func fill(file *os.File, data []byte) error {
	defer file.Close()
	if _, err := file.Write(data); err != nil {
		return err
	}
	if err := file.Chmod(0o644); err != nil {
		return err
	}
	if err := file.Sync(); err != nil {
		return err
	}
	return file.Close()
}

// options is what the command line asks for.
type options struct {
	address          string
	output           string
	cancelAfterSteps int
	timeout          time.Duration
	request          *samplerv1.GenerateRequest
}

func (o *options) pictureCount() int {
	if o.request.Count == 0 {
		return 1 // the protocol's default
	}
	return int(o.request.Count)
}

// parse reads the command line; what it returns as an error, it has already told the user.
func parse(args []string) (*options, error) {
	opts := &options{request: &samplerv1.GenerateRequest{}}
	flags := flag.NewFlagSet("generate", flag.ContinueOnError)
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), usage)
		flags.PrintDefaults()
	}
	flags.StringVar(&opts.address, "address", "", "where the sampler listens, `HOST:PORT` or unix:/path (required)")
	flags.StringVar(&opts.request.Prompt, "prompt", "", "what the picture shows (required)")
	flags.StringVar(&opts.output, "o", "", "the `file` to write; several pictures are numbered (required)")
	flags.StringVar(&opts.request.Model, "model", "", "name of the model (default: the only one)")
	int32Var(flags, &opts.request.WidthPx, "width", "width in `pixels` (default: the model's)")
	int32Var(flags, &opts.request.HeightPx, "height", "height in `pixels` (default: the model's)")
	int32Var(flags, &opts.request.StepCount, "steps", "`number` of denoise steps (default: the model's)")
	int32Var(flags, &opts.request.Count, "count", "`number` of pictures (default 1)")
	flags.Func("seed", "`number` that picture 0 starts from (default: the sampler chooses)", func(text string) error {
		seed, err := strconv.ParseInt(text, 10, 64)
		opts.request.Seed = &seed
		return err
	})
	flags.IntVar(&opts.cancelAfterSteps, "cancel-after-steps", 0, "cancel the call after this `number` of steps, exit 3")
	seconds := flags.Float64("timeout", 0, "give up after so many `seconds` (default: never)")

	if len(args) == 0 || args[0] != "generate" {
		flags.Usage()
		return nil, errors.New("no such command")
	}
	if err := flags.Parse(args[1:]); err != nil {
		return nil, err
	}
	opts.timeout = time.Duration(*seconds * float64(time.Second))
	return opts, complete(flags)
}

// complete refuses a command line with a required option missing or a word too many.
// An empty prompt is not missing: whether it will do is the sampler's to say.
func complete(flags *flag.FlagSet) error {
	given := map[string]bool{}
	flags.Visit(func(option *flag.Flag) { given[option.Name] = true })
	if given["address"] && given["prompt"] && given["o"] && flags.NArg() == 0 {
		return nil
	}
	complain("--address, --prompt and -o are required, and nothing beside options")
	flags.Usage()
	return errors.New("incomplete command line")
}

func int32Var(flags *flag.FlagSet, target *int32, name, help string) {
	flags.Func(name, help, func(text string) error {
		value, err := strconv.ParseInt(text, 10, 32)
		*target = int32(value)
		return err
	})
}
