// Package kubelet is a client of the HTTP server of this node's kubelet.
package kubelet

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"os"
)

// Config configures a client.
type Config struct {
	URL string // http://HOST:PORT/PATH or https://HOST:PORT/PATH
	// TokenFile and CAFile are read for each request, because both are rotated. They apply to https only. If empty, no token is sent,
	// and the CAs of the system are used.
	TokenFile, CAFile string
	// ServerName is the name in the kubelet's certificate; by default, the host of the URL.
	ServerName string
	// SelfSigned returns the certificate, in PEM, that the kubelet generates by default if it is given none
	// (cmd/kubelet/app/server.go, initializeTLS). It is trusted in addition to CAFile. May be nil.
	SelfSigned func() ([]byte, error)
}

// At returns the configuration for another path on the same server.
func (c Config) At(path string) (Config, error) {
	u, err := url.Parse(c.URL)
	if err != nil {
		return c, err
	}
	c.URL = (&url.URL{Scheme: u.Scheme, Host: u.Host, Path: path}).String()
	return c, nil
}

// Client gets one URL, over connections of its own.
type Client struct {
	config Config
	client *http.Client
	ca     []byte // content of CAFile, as client trusts it
}

// New returns a client. It checks the configuration, but does not connect.
func New(c Config) (*Client, error) {
	u, err := url.Parse(c.URL)
	if err != nil {
		return nil, err
	}
	if u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return nil, fmt.Errorf("--kubelet-url %q: must be http://HOST:PORT/PATH or https://HOST:PORT/PATH", c.URL)
	}
	c.ServerName = cmp.Or(c.ServerName, u.Hostname())
	if u.Scheme == "http" {
		c.TokenFile, c.CAFile = "", "" // anything on the path could read the token
	}
	return &Client{config: c}, nil
}

// Error is a failure to get a response with status 200.
type Error struct {
	Kind string // completes "the kubelet …" in logs, and stays the same between attempts
	Err  error  // of this attempt
}

func (e *Error) Error() string { return e.Err.Error() }
func (e *Error) Unwrap() error { return e.Err }

// Unreachable is the kind of failures to connect, or to get a complete response in time.
const Unreachable = "is unreachable"

// Get returns a response with status 200, whose body the caller must close. The error is an *Error.
func (c *Client) Get(ctx context.Context, accept string) (*http.Response, error) {
	request, err := c.request(ctx, accept)
	if err != nil {
		return nil, &Error{"cannot be queried", err}
	}
	response, err := c.client.Do(request)
	if err != nil {
		return nil, &Error{Unreachable, err}
	}
	if response.StatusCode != http.StatusOK {
		_ = response.Body.Close()
		return nil, &Error{"refuses the request: " + response.Status, errors.New(response.Status)}
	}
	return response, nil
}

func (c *Client) request(ctx context.Context, accept string) (*http.Request, error) {
	if err := c.prepare(); err != nil {
		return nil, err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, c.config.URL, nil)
	if err != nil {
		return nil, err
	}
	request.Header.Set("Accept", accept)
	request.Header.Set("User-Agent", "probeletd")
	if c.config.TokenFile != "" {
		token, err := os.ReadFile(c.config.TokenFile)
		if err != nil {
			return nil, fmt.Errorf("--kubelet-token-file: %w", err)
		}
		request.Header.Set("Authorization", "Bearer "+string(bytes.TrimSpace(token)))
	}
	return request, nil
}

// prepare creates the HTTP client, and a new one whenever the CA has changed.
func (c *Client) prepare() error {
	var ca []byte
	var pool *x509.CertPool
	if c.config.CAFile != "" {
		var err error
		if ca, err = os.ReadFile(c.config.CAFile); err != nil {
			return fmt.Errorf("--kubelet-ca-file: %w", err)
		}
		if pool = x509.NewCertPool(); !pool.AppendCertsFromPEM(ca) {
			return fmt.Errorf("--kubelet-ca-file %s: no certificate found", c.config.CAFile)
		}
	}
	if c.client != nil && bytes.Equal(ca, c.ca) {
		return nil
	}
	if c.client != nil {
		c.client.CloseIdleConnections()
	}
	c.ca = ca
	c.client = &http.Client{
		Transport: &http.Transport{ // without a proxy, since the kubelet is on this node
			TLSClientConfig: &tls.Config{
				ServerName: c.config.ServerName, MinVersion: tls.VersionTLS12,
				InsecureSkipVerify: true, // replaced by verify
				VerifyConnection:   func(s tls.ConnectionState) error { return c.verify(s, pool) },
			},
		},
		// Redirects would leave the kubelet, with our token.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return nil
}

// verify accepts what package tls accepts, and the certificate that this node's kubelet generated itself, which has neither an address nor
// a CA that we know.
func (c *Client) verify(s tls.ConnectionState, roots *x509.CertPool) error {
	intermediates := x509.NewCertPool()
	for _, certificate := range s.PeerCertificates[1:] {
		intermediates.AddCert(certificate)
	}
	_, err := s.PeerCertificates[0].Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, DNSName: c.config.ServerName})
	if err == nil || c.config.SelfSigned == nil {
		return err
	}
	text, readErr := c.config.SelfSigned()
	if readErr != nil {
		return fmt.Errorf("%w (and failed to read the certificate that the kubelet generated: %w)", err, readErr)
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type == "CERTIFICATE" && bytes.Equal(block.Bytes, s.PeerCertificates[0].Raw) {
			return nil
		}
	}
	return fmt.Errorf("%w (and it is not the certificate that the kubelet generated)", err)
}
