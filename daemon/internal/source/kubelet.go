package source

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"time"

	corev1 "k8s.io/api/core/v1"
	kubejson "sigs.k8s.io/json"

	"github.com/probelet/probelet/daemon/internal/probe"
)

const (
	// refreshAfter is the first wait after a pod was announced: the kubelet learns its address a moment after the plugin.
	// Later ones double, up to the poll interval.
	refreshAfter = 500 * time.Millisecond
	// kubeletTimeout is for one answer, from its request to its last byte.
	kubeletTimeout = 10 * time.Second
	// maxPodList is how long an answer may be. It is read pod by pod, so this is time more than memory.
	maxPodList = 256 << 20
)

// KubeletConfig is how the kubelet is asked.
type KubeletConfig struct {
	URL string // of its pods
	// TokenFile and CAFile are read for each request, as both are renewed. They are for https only; empty: no token, and
	// the system's authorities.
	TokenFile, CAFile string
	// ServerName is the name in the kubelet's certificate; empty: the host of the URL.
	ServerName string
	// SelfSigned returns the certificate, in PEM, that the kubelet made for itself if it was given none, as it does unless
	// told otherwise (cmd/kubelet/app/server.go, initializeTLS). It is good besides what CAFile is good for. May be nil.
	SelfSigned func() ([]byte, error)
	Poll       time.Duration
}

// Kubelet asks the kubelet of this node.
type Kubelet struct {
	config  KubeletConfig
	timeout time.Duration
	refresh chan struct{}
	health
	client *http.Client
	ca     []byte // that client trusts
	last   publisher
}

// NewKubelet checks the configuration. Whether the kubelet answers is Run's concern.
func NewKubelet(c KubeletConfig, log *slog.Logger) (*Kubelet, error) {
	u, err := url.Parse(c.URL)
	if err != nil {
		return nil, err
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("%q: must be http://HOST:PORT/pods or https://HOST:PORT/pods", c.URL)
	}
	if c.Poll <= 0 {
		return nil, fmt.Errorf("poll interval %s: must be positive", c.Poll)
	}
	c.ServerName = cmp.Or(c.ServerName, u.Hostname())
	if u.Scheme == "http" {
		c.TokenFile, c.CAFile = "", "" // a token is not for everyone on the way
	}
	return &Kubelet{
		config: c, timeout: kubeletTimeout, refresh: make(chan struct{}, 1),
		health: health{log: log.With("source", c.URL)},
	}, nil
}

// Refresh implements Source.
func (k *Kubelet) Refresh() {
	select {
	case k.refresh <- struct{}{}:
	default: // one is waiting already
	}
}

// Run implements Source.
func (k *Kubelet) Run(ctx context.Context, snapshots chan<- []probe.Pod) error {
	wait := refreshAfter
	for {
		pods, err := k.fetch(ctx)
		if ctx.Err() != nil {
			return nil
		}
		var failure *kubeletError
		if errors.As(err, &failure) {
			k.set(failure.kind, failure)
		} else {
			k.set("", nil)
			if !k.last.send(ctx, snapshots, pods) {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-k.refresh:
			wait = refreshAfter
		case <-time.After(min(wait, k.config.Poll)):
			wait = min(2*wait, k.config.Poll)
		}
	}
}

// kubeletError is a kind of failure, as it is logged, and what happened this time.
type kubeletError struct {
	kind string
	err  error
}

func (e *kubeletError) Error() string { return e.err.Error() }
func (e *kubeletError) Unwrap() error { return e.err }

// fetch returns the pods; its error is a kubeletError.
func (k *Kubelet) fetch(ctx context.Context) ([]probe.Pod, error) {
	ctx, cancel := context.WithTimeout(ctx, k.timeout)
	defer cancel()
	request, err := k.request(ctx)
	if err != nil {
		return nil, &kubeletError{"cannot be asked", err}
	}
	response, err := k.client.Do(request)
	if err != nil {
		return nil, &kubeletError{"is not reachable", err}
	}
	defer response.Body.Close() //nolint:errcheck // read only
	if response.StatusCode != http.StatusOK {
		return nil, &kubeletError{"refuses: " + response.Status, errors.New(response.Status)}
	}
	var pods []probe.Pod
	err = readPodList(&limitedReader{response.Body, maxPodList}, func(p *corev1.Pod) {
		if pod, skipped := onNode(p); skipped == "" {
			pods = append(pods, pod)
		}
	})
	if ctx.Err() != nil {
		return nil, &kubeletError{"is not reachable", fmt.Errorf("no whole answer within %s", k.timeout)}
	}
	if err != nil {
		return nil, &kubeletError{"gives no usable answer", err}
	}
	return pods, nil
}

func (k *Kubelet) request(ctx context.Context) (*http.Request, error) {
	if err := k.prepareClient(); err != nil {
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, k.config.URL, nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", "application/json")
	request.Header.Set("User-Agent", "probeletd")
	if k.config.TokenFile != "" {
		token, err := os.ReadFile(k.config.TokenFile)
		if err != nil {
			return nil, fmt.Errorf("token: %w", err)
		}
		request.Header.Set("Authorization", "Bearer "+string(bytes.TrimSpace(token)))
	}
	return request, nil
}

// prepareClient makes a client, and a new one when the authority is another one.
func (k *Kubelet) prepareClient() error {
	var ca []byte
	var pool *x509.CertPool
	if k.config.CAFile != "" {
		var err error
		if ca, err = os.ReadFile(k.config.CAFile); err != nil {
			return fmt.Errorf("CA: %w", err)
		}
		if pool = x509.NewCertPool(); !pool.AppendCertsFromPEM(ca) {
			return fmt.Errorf("CA: %s: no certificate in it", k.config.CAFile)
		}
	}
	if k.client != nil && bytes.Equal(ca, k.ca) {
		return nil
	}
	if k.client != nil {
		k.client.CloseIdleConnections()
	}
	k.ca = ca
	k.client = &http.Client{
		Transport: &http.Transport{ // no proxy: it is this node
			TLSClientConfig: &tls.Config{
				ServerName: k.config.ServerName, MinVersion: tls.VersionTLS12,
				InsecureSkipVerify: true, // verify does it
				VerifyConnection:   func(s tls.ConnectionState) error { return k.verify(s, pool) },
			},
		},
		// Elsewhere there is nothing to be asked, least of all with our token.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return nil
}

// verify accepts what package tls accepts, and the certificate that the kubelet of this node made for itself: that names
// neither address nor authority that we know.
func (k *Kubelet) verify(s tls.ConnectionState, roots *x509.CertPool) error {
	intermediates := x509.NewCertPool()
	for _, c := range s.PeerCertificates[1:] {
		intermediates.AddCert(c)
	}
	_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, DNSName: k.config.ServerName})
	if err == nil || k.config.SelfSigned == nil {
		return err
	}
	text, readErr := k.config.SelfSigned()
	if readErr != nil {
		return fmt.Errorf("%w (and the certificate that the kubelet made for itself is not known: %w)", err, readErr)
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" && bytes.Equal(block.Bytes, s.PeerCertificates[0].Raw) {
			return nil
		}
	}
	return fmt.Errorf("%w (and it is not the certificate that the kubelet made for itself)", err)
}

// limitedReader fails, rather than ends, where more comes than is allowed.
type limitedReader struct {
	from io.Reader
	left int64
}

func (r *limitedReader) Read(p []byte) (int, error) {
	if r.left <= 0 {
		return 0, fmt.Errorf("answer of more than %d MiB", maxPodList>>20)
	}
	n, err := r.from.Read(p[:min(int64(len(p)), r.left)])
	r.left -= int64(n)
	return n, err
}

// readPodList reads a PodList and nothing else, and never has more than one of its pods in memory. Each may have been
// called for pods of a list that turns out to be no good.
func readPodList(r io.Reader, each func(*corev1.Pod)) error {
	d := json.NewDecoder(r)
	if err := expect(d, json.Delim('{')); err != nil {
		return err
	}
	var kind string
	items := 0
	for d.More() {
		key, err := d.Token()
		if err != nil {
			return err
		}
		switch key {
		case "kind":
			err = d.Decode(&kind)
		case "items":
			items, err = readItems(d, each)
		default:
			var ignored json.RawMessage
			err = d.Decode(&ignored)
		}
		if err != nil {
			return fmt.Errorf("%v: %w", key, unexpected(err))
		}
	}
	if err := expect(d, json.Delim('}')); err != nil {
		return err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return errors.New("more than one JSON value")
	}
	if kind != "PodList" {
		return fmt.Errorf("kind: %q with %d items: must be PodList", kind, items)
	}
	return nil
}

func expect(d *json.Decoder, want json.Delim) error {
	got, err := d.Token()
	if err == nil && got != want {
		err = fmt.Errorf("%v where %v was expected", got, want)
	}
	return unexpected(err)
}

// unexpected is err, but the end of what is no JSON yet is said to be so.
func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

func readItems(d *json.Decoder, each func(*corev1.Pod)) (int, error) {
	start, err := d.Token()
	if err != nil || start == nil { // null: no pods
		return 0, err
	}
	if start != json.Delim('[') {
		return 0, fmt.Errorf("%v where a list was expected", start)
	}
	n := 0
	var raw json.RawMessage
	for ; d.More(); n++ {
		if err := d.Decode(&raw); err != nil {
			return n, err
		}
		var pod corev1.Pod
		// As Kubernetes does it: cases matter, fields of later versions do not.
		if err := kubejson.UnmarshalCaseSensitivePreserveInts(raw, &pod); err != nil {
			return n, fmt.Errorf("[%d]: %w", n, err)
		}
		if pod.Name == "" || pod.Namespace == "" {
			return n, fmt.Errorf("[%d]: a pod without name or namespace", n)
		}
		each(&pod)
	}
	_, err = d.Token()
	return n, err
}
